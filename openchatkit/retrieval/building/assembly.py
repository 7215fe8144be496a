"""A plan -> the next snapshot of an index: passages are staged, those without a vector embedded, everything is written.

Intermediate files are in the partial folder of the index until the new manifest is in place. The first process reads,
plans and writes; all processes embed, each its part of the texts.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loguru import logger
from tqdm import tqdm

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.retrieval_index import EncoderRecord, IndexRecord, SourceRecord
from openchatkit.retrieval import chunks, ranking, snapshot, table
from openchatkit.retrieval.building import plan, vector_cache
from openchatkit.retrieval.building.current_snapshot import CurrentSnapshot, clear_if_damaged, open_current
from openchatkit.retrieval.building.plan import BuildPlan
from openchatkit.retrieval.building.ranks import Ranks
from openchatkit.retrieval.building.vector_cache import KnownVectors
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.index import check_encoder
from openchatkit.retrieval.reading import reader
from openchatkit.retrieval.table import PassageRow, Table
from openchatkit.storage import storage_errors

_WINDOW = 1 << 14  # texts that are sorted by length together
_SLICE = 512  # texts embedded between two writes: a kill loses at most these
_BLOCK = 1 << 14  # vectors copied at a time
_MakePlan = Callable[[CurrentSnapshot | None], BuildPlan]
_TABLE, _MISSING = "staged.arrow", "missing.npy"
_ALONE = Ranks()
_ADVICE = "what has been embedded is kept"


@dataclass(frozen=True)
class _SourceRows:
    """Rows of a source in one of the two tables, the current one or the staged one."""

    source: SourceRecord
    table: Table
    digests: np.ndarray  # of all rows of that table


@dataclass(frozen=True)
class _Staged:
    """All sources of the next snapshot; `missing` are the rows of the staged `table` that have no vector."""

    table: Table
    runs: list[_SourceRows]
    known: KnownVectors | None
    encoder: EncoderRecord | None
    missing: np.ndarray


@dataclass(frozen=True)
class _EmbeddingWork:
    """The number of rows of the staged table, how many of them to embed, and the encoder."""

    rows: int
    missing: int
    encoder: str
    max_tokens: int


def carry_out(
    folder: Path, make_plan: _MakePlan, *, device: str = "cpu", ranks: Ranks = _ALONE, replace: bool = False
) -> IndexRecord | None:
    """Write the snapshot that `make_plan` describes; return the record of the index, None except in the first process.

    `make_plan` is called while no other command changes the index. With `replace`, the index may be missing or damaged.
    UserError: what `make_plan` raises, no text at all, a vector that is not finite, a full disk, a folder of something
    else.
    """
    with storage_errors(folder, _ADVICE, every=True):
        if not ranks.first:
            ranks.agree(None)
            _embed(layout.partial_folder(folder), None, device, ranks, None)
            return None
        if replace:
            layout.check_own(folder)
        empty = not folder.exists()
        try:
            with snapshot.lock_for_writing(folder):
                if replace:
                    clear_if_damaged(folder)
                with open_current(folder) as present:
                    return _lead(folder, device, ranks, present, make_plan)
        finally:
            if empty and not vector_cache.holds_any(layout.partial_folder(folder)):
                shutil.rmtree(layout.partial_folder(folder), ignore_errors=True)
                with contextlib.suppress(OSError):  # it holds an index
                    folder.rmdir()


def _lead(
    folder: Path, device: str, ranks: Ranks, present: CurrentSnapshot | None, make_plan: _MakePlan
) -> IndexRecord:
    partial = layout.partial_folder(folder)
    with contextlib.ExitStack() as stack:
        error = wanted = staged = work = None
        try:
            wanted = make_plan(present)
            if wanted.new or present is None or len(wanted.unchanged) != present.record.sources:
                staged = _stage(partial, wanted, present, stack)
            if staged is not None and len(staged.missing):
                assert wanted.encoder is not None, folder
                assert staged.encoder is not None, folder
                work = _EmbeddingWork(
                    len(staged.table), len(staged.missing), wanted.encoder.name, staged.encoder.max_tokens
                )
        except UserError as failure:
            error = failure
        ranks.agree(error)
        assert wanted is not None, folder
        _embed(partial, wanted.encoder, device, ranks, work)
        if staged is not None:
            record = _write(folder, wanted, staged, present)
        else:
            assert present is not None, folder
            record = _rewrite_if_changed(folder, wanted, present.record)
    shutil.rmtree(partial, ignore_errors=True)
    return record


def _rewrite_if_changed(folder: Path, wanted: BuildPlan, record: IndexRecord) -> IndexRecord:
    """Keep the passages of the index; write a snapshot only if the records of files or settings have changed."""
    logger.info(f"{folder}: nothing has changed, {record.rows:,} passages")
    sources = sorted(wanted.unchanged, key=lambda source: source.source)
    before = layout.read_sources(folder, record), layout.read_skipped(folder, record), record.chunking
    if before == (sources, wanted.excluded, wanted.about):
        return record
    return snapshot.rewrite_sources(folder, sources=sources, skipped=wanted.excluded, chunking=wanted.about)


def _stage(
    partial: Path, wanted: BuildPlan, present: CurrentSnapshot | None, stack: contextlib.ExitStack
) -> _Staged | None:
    """Read the new sources into a table of their own, and list its rows that have no vector yet.

    None if the index needs no change of passages.
    """
    described = None
    if wanted.encoder is not None:
        described = present.record.encoder if present is not None else wanted.encoder.record()
        assert described is not None, partial
        vector_cache.start(partial, described)
    partial.mkdir(parents=True, exist_ok=True)
    records: list[SourceRecord] = []
    count = table.write(partial / _TABLE, plan.read_all(wanted, records))
    if not records and not wanted.unchanged:
        raise UserError(_explain_nothing(wanted))
    if not records and present is not None and len(wanted.unchanged) == present.record.sources:
        return None
    staged = stack.enter_context(Table(partial / _TABLE, count))
    digests = vector_cache.as_keys(staged.digests(), count)
    runs = [_SourceRows(record, staged, digests) for record in records]
    known = KnownVectors(described.dimension) if described is not None else None
    if present is not None:
        before = vector_cache.as_keys(present.table.digests(), present.record.rows)
        runs += [_SourceRows(record, present.table, before) for record in wanted.unchanged]
        if known is not None and present.vectors is not None:
            known.add(before, present.vectors)
    runs.sort(key=lambda run: run.source.source)
    missing = np.empty(0, np.int64)
    if known is not None and described is not None and wanted.encoder is not None:
        for part in vector_cache.read_parts(partial, described.dimension):
            known.add(*part)
        missing = _find_missing(digests, records, known)
        if present is not None and len(missing):
            check_encoder(partial.parent, described, wanted.encoder)
        np.save(partial / _MISSING, missing)
    return _Staged(staged, runs, known, described, missing)


def _explain_nothing(wanted: BuildPlan) -> str:
    """Return the message about why there is nothing to index."""
    excluded = wanted.excluded
    if not excluded:
        return f"no file to read there: expected files of these kinds: {', '.join(reader.READABLE)}, or code"
    some = "; ".join(f"{each.source} ({each.reason})" for each in excluded[:3])
    return f"no text to make an index of; {len(excluded):,} files and folders were excluded: {some}"


def _find_missing(digests: np.ndarray, records: list[SourceRecord], known: KnownVectors) -> np.ndarray:
    """Return the first row of each text without a vector; rows without a source are from unreadable files."""
    wanted = np.zeros(len(digests), bool)
    for record in records:
        wanted[record.first : record.first + record.rows] = True
    wanted &= known.locate(digests) < 0
    rows = np.flatnonzero(wanted)
    return np.sort(rows[np.unique(digests[rows], return_index=True)[1]])


def _embed(partial: Path, encoder: Encoder | None, device: str, ranks: Ranks, work: _EmbeddingWork | None) -> None:
    """Embed the share of this process in the missing texts; return when all processes are done."""
    work = ranks.share(work)
    if work is None:
        return
    encoder = encoder or Encoder(work.encoder, device, work.max_tokens)
    error = None
    try:
        if not (partial / _MISSING).is_file():
            raise UserError(f"{partial} is not there for process {ranks.rank}: all must see the index's folder")
        missing = np.load(partial / _MISSING, allow_pickle=False)[ranks.rank :: ranks.size]
        with (
            Table(partial / _TABLE, work.rows) as rows,
            vector_cache.VectorWriter(partial, ranks.rank, encoder.dimension) as writer,
            progress.bar(
                len(missing), "passages embedded", unit="passage", disable=None if ranks.first else True
            ) as bar,
        ):
            _embed_rows(missing, rows, encoder, writer, bar)
    except KeyboardInterrupt:
        logger.info("what has been embedded is kept: the same command goes on from there")
        raise
    except UserError as failure:
        error = failure
    ranks.agree(error)


def _embed_rows(
    missing: np.ndarray, rows: Table, encoder: Encoder, writer: vector_cache.VectorWriter, bar: tqdm
) -> None:
    for first in range(0, len(missing), _WINDOW):
        window = [rows.row(number) for number in missing[first : first + _WINDOW].tolist()]
        # Texts of similar length are batched, so that little is computed for padding.
        window.sort(key=lambda row: -len(row.text))
        for start in range(0, len(window), _SLICE):
            some = window[start : start + _SLICE]
            texts = [chunks.text_to_embed(row.title, row.text) for row in some]
            writer.add([row.digest for row in some], encoder.encode(texts))
            bar.update(len(some))


def _write(folder: Path, wanted: BuildPlan, staged: _Staged, present: CurrentSnapshot | None) -> IndexRecord:
    """Write the snapshot: sources in the order of their names, each row with the vector of its digest.

    The score threshold is measured again where passages were embedded: the encoder is loaded then.
    """
    sources, first = [], 0
    for run in staged.runs:
        sources.append(dataclasses.replace(run.source, first=first))
        first += run.source.rows
    known = staged.known
    if known is not None and staged.encoder is not None:
        for part in vector_cache.read_parts(layout.partial_folder(folder), staged.encoder.dimension):
            known.add(*part)
    threshold = present.record.score_threshold if present is not None else None
    if known is not None and wanted.encoder is not None and (threshold is None or len(staged.missing)):
        threshold = ranking.measure_threshold(wanted.encoder, known.take(_locate(staged.runs, known, sampled=True)))
    return snapshot.write_snapshot(
        folder,
        rows=_read_rows(staged.runs),
        vectors=None if known is None else _read_vectors(staged.runs, known),
        encoder=staged.encoder,
        score_threshold=threshold,
        sources=sources,
        skipped=wanted.excluded,
        chunking=wanted.about,
    )


def _read_rows(runs: list[_SourceRows]) -> Iterator[PassageRow]:
    document = 0
    with progress.bar(sum(run.source.rows for run in runs), "passages written", unit="passage") as bar:
        for run in runs:
            last = None
            for row in run.table.rows(run.source.first, run.source.first + run.source.rows):
                document, last = document + (row.document != last), row.document
                yield dataclasses.replace(row, document=document)
            bar.update(run.source.rows)


def _read_vectors(runs: list[_SourceRows], known: KnownVectors) -> Iterator[np.ndarray]:
    rows = _locate(runs, known)
    for first in range(0, len(rows), _BLOCK):
        yield known.take(rows[first : first + _BLOCK])


def _locate(runs: list[_SourceRows], known: KnownVectors, *, sampled: bool = False) -> np.ndarray:
    """Return the row of the known vectors for each passage, or for those that the score threshold is measured with."""
    digests = [run.digests[run.source.first : run.source.first + run.source.rows] for run in runs]
    wanted = np.concatenate(digests)
    return known.locate(wanted[ranking.sample_rows(len(wanted))] if sampled else wanted)
