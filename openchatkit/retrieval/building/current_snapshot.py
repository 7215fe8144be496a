"""The current snapshot of an index, opened for making the next one."""

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
    """The open table and vectors of the current snapshot."""

    record: IndexRecord
    table: Table
    vectors: np.ndarray | None


@contextlib.contextmanager
def open_current(folder: Path) -> Iterator[CurrentSnapshot | None]:
    """Open the current snapshot, None without an index; DamagedError: its files do not match the manifest."""
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
    """Remove the manifest of an index that cannot be read: its files are useless."""
    if not layout.exists(folder):
        return
    try:
        layout.check_files(folder, *layout.read(folder))
    except DamagedError as error:
        logger.info(f"{error}: built again")
        (folder / layout.MANIFEST).unlink()
