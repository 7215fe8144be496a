"""The snapshot that an index has, opened for the next to be made of it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loguru import logger

from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.manifest import DamagedError
from openchatkit.formats.retrieval_index import IndexRecord
from openchatkit.retrieval import vector_store
from openchatkit.retrieval.table import Table


@dataclass
class CurrentSnapshot:
    """The snapshot that an index has, open."""

    record: IndexRecord
    table: Table
    vectors: np.ndarray | None


@contextlib.contextmanager
def open_current(folder: Path) -> Iterator[CurrentSnapshot | None]:
    """The present snapshot, None where there is none; DamagedError where its files are not what they should be."""
    if not layout.exists(folder):
        yield None
        return
    record, files = layout.read(folder)
    layout.check_files(folder, record, files)

    def path(role: str) -> Path:
        return folder / layout.file_name(role, record.snapshot)

    found = None
    if record.encoder is not None:
        found = vector_store.open_array(path("vectors"), rows=record.rows, dimension=record.encoder.dimension)
    with Table(path("table"), record.rows) as rows:
        yield CurrentSnapshot(record, rows, found)


def clear_if_damaged(folder: Path) -> None:
    """Take away the manifest of an index that cannot be read: what it named is of no use."""
    if not layout.exists(folder):
        return
    try:
        layout.check_files(folder, *layout.read(folder))
    except DamagedError as error:
        logger.info(f"{error}: made anew")
        (folder / layout.MANIFEST).unlink()
