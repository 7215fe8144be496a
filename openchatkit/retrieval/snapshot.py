"""Writing an index: all files of a new snapshot, then its manifest; then the previous snapshot is removed.

A kill at any moment leaves the previous snapshot as it was; the next writer removes the unfinished files.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from openchatkit import progress, storage
from openchatkit.errors import UserError
from openchatkit.formats import manifest
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.manifest import FileRecord
from openchatkit.formats.retrieval_index import (
    DenseRecord,
    EncoderRecord,
    IndexRecord,
    ScoreThreshold,
    Skipped,
    SourceRecord,
    SparseRecord,
)
from openchatkit.retrieval import dense, sparse, table, vector_store
from openchatkit.retrieval.ranking import NO_COSINE


@contextlib.contextmanager
def lock_for_writing(folder: Path) -> Iterator[None]:
    """Hold an index for writing; a second writer waits. Makes the folder, and removes what a kill left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with storage.hold_lock(
        layout.lock_path(folder), f"{folder} is being written to by another process: waiting for it"
    ):
        _remove_stale_files(folder)
        yield


def _remove_stale_files(folder: Path) -> None:
    """Remove files of snapshots that the manifest does not name. Processes that have them open keep them."""
    for path in layout.stale_files(folder):
        path.unlink(missing_ok=True)


def write_snapshot(
    folder: Path,
    *,
    rows: Iterable[table.PassageRow],
    vectors: Iterable[np.ndarray] | None,
    encoder: EncoderRecord | None,
    sources: Iterable[SourceRecord] = (),
    skipped: Iterable[Skipped] = (),
    chunking: Mapping[str, Any] | None = None,
    score_threshold: ScoreThreshold | None = None,
    dense_options: Mapping[str, Any] | None = None,
) -> IndexRecord:
    """Write a snapshot of these rows in place of the previous one; the caller holds `lock_for_writing(folder)`.

    `vectors` are parts [any, dimension] made by `encoder`, one vector a row in the order of the rows; both are None for
    an index that is searched by words alone. `rows` and `vectors` are read once, one after the other, and may come from
    the snapshot that is replaced. `score_threshold` defaults to one that asks for no cosine; `dense_options` go to
    `dense.build`. UserError: there are no rows, or vectors are missing or not finite.
    """
    assert (vectors is None) == (encoder is None), encoder
    if encoder is not None and encoder.metric not in (vector_store.COSINE, vector_store.DOT):
        raise UserError(
            f"{encoder.name} compares by {encoder.metric!r}: expected an encoder for cosine or dot products"
        )
    snapshot = layout.read(folder)[0].snapshot + 1 if layout.exists(folder) else 1
    try:
        count = table.write(folder / layout.file_name("table", snapshot), rows)
        if count == 0:
            raise UserError(f"there is no passage to put into {folder}: give files that hold text")
        dense_record = _write_dense(folder, snapshot, count, vectors, encoder, dict(dense_options or {}))
        sparse_record = _write_sparse(folder, snapshot, count)
        record = IndexRecord(
            snapshot,
            count,
            layout.write_lines(folder / layout.file_name("sources", snapshot), sources),
            layout.write_lines(folder / layout.file_name("skipped", snapshot), skipped),
            encoder,
            dense_record,
            sparse_record,
            score_threshold or NO_COSINE,
            dict(chunking or {}),
        )
        return _publish(folder, record)
    finally:
        _remove_stale_files(folder)  # of the previous snapshot or, after a failure, of this one


def rewrite_sources(
    folder: Path, *, sources: Iterable[SourceRecord], skipped: Iterable[Skipped], chunking: Mapping[str, Any]
) -> IndexRecord:
    """Write a snapshot with the passages of the current one and other records of their files.

    The caller holds `lock_for_writing(folder)`. Unchanged files are linked, where the file system can, not copied.
    """
    before, files = layout.read(folder)
    record = dataclasses.replace(before, snapshot=before.snapshot + 1, chunking=dict(chunking))
    replaced: dict[str, Iterable[Any]] = {"sources": sources, "skipped": skipped}
    known = {}
    try:
        counts = {role: layout.write_lines(_path(folder, role, record), each) for role, each in replaced.items()}
        for role in set(layout.roles(record)) - set(replaced):
            old, new = _path(folder, role, before), _path(folder, role, record)
            try:
                new.hardlink_to(old)
            except OSError:
                shutil.copyfile(old, new)
            known[new.name] = dataclasses.replace(files[old.name], name=new.name)
        record = dataclasses.replace(record, sources=counts["sources"], skipped=counts["skipped"])
        return _publish(folder, record, known)
    finally:
        _remove_stale_files(folder)


def _path(folder: Path, role: str, record: IndexRecord) -> Path:
    return folder / layout.file_name(role, record.snapshot)


def _write_dense(
    folder: Path,
    snapshot: int,
    count: int,
    vectors: Iterable[np.ndarray] | None,
    encoder: EncoderRecord | None,
    options: dict[str, Any],
) -> DenseRecord | None:
    if vectors is None or encoder is None:
        return None
    path = folder / layout.file_name("vectors", snapshot)
    vector_store.write(path, vectors, rows=count, dimension=encoder.dimension, metric=encoder.metric)
    written = vector_store.open_array(path, rows=count, dimension=encoder.dimension)
    return dense.build(written, folder / layout.file_name("dense", snapshot), **options)


def _write_sparse(folder: Path, snapshot: int, count: int) -> SparseRecord:
    spill = layout.temporary_path(folder, snapshot)
    with table.Table(folder / layout.file_name("table", snapshot), count) as written:
        return sparse.build(written.texts(), sparse_paths(folder, snapshot), rows=count, temporary=spill)


def sparse_paths(folder: Path, snapshot: int) -> sparse.SparsePaths:
    """Paths of the BM25 index of a snapshot."""
    return sparse.SparsePaths(
        *(folder / layout.file_name(role, snapshot) for role in ("scores", "postings", "starts", "words"))
    )


def _publish(folder: Path, record: IndexRecord, known: Mapping[str, FileRecord] | None = None) -> IndexRecord:
    """Force the files to disk, hash those that are not `known`, and name them in the manifest."""
    names = [layout.file_name(role, record.snapshot) for role in layout.roles(record)]
    files = []
    with progress.bar(len(names), "files hashed", unit="file") as bar:
        for name in names:
            storage.sync(folder / name)
            files.append((known or {}).get(name) or manifest.record(folder / name))
            bar.update()
    storage.sync(folder)
    record = layout.write(folder, record, files)
    size = sum(file.size for file in files)
    logger.info(f"{folder}: {record.rows:,} passages, {size / 1e6:,.1f} MB, snapshot {record.snapshot}")
    return record
