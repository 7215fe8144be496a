"""The ledger of a run, kept by rank 0: a row a step, all of them on disk before a checkpoint vouches for them."""

from datetime import datetime, timezone
from pathlib import Path

from loguru import logger

from openchatkit.distributed.layout import Layout
from openchatkit.formats import ledger
from openchatkit.storage import storage_errors
from openchatkit.training.setup import RunProgress
from openchatkit.training.step import Schedule, StepResult


class LedgerWriter:
    """Appends to the ledger in `folder` after the steps of `progress`; warns if its rows are not the checkpoint's.

    Such rows stay readable, but can no longer prove that earlier samples were trained exactly once.
    """

    def __init__(self, folder: Path, progress: RunProgress, layout: Layout, schedule: Schedule) -> None:
        self.folder = folder
        with storage_errors(folder):
            self._file = ledger.LedgerFile(folder, progress.step)
        if progress.ledger not in (None, self._file.chain):
            logger.warning(
                "{} is not the ledger of the checkpoint at step {}: tools/inspect_data.py --verify will not be able to "
                "prove what the steps up to there were trained on",
                folder / ledger.LEDGER,
                progress.step,
            )
        self._layout = _describe(layout, schedule)
        self._started = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def add(self, step: int, rows: int, result: StepResult) -> None:
        """Add the row of `step`, counted from 1, which was taken on `rows` samples."""
        first = (step - 1) * rows
        digest = f"{result.digest:016x}"
        row = ledger.LedgerRow(step, first, rows, digest, result.applied, self._layout, self._started)
        with storage_errors(self.folder):
            self._file.append(row)

    def sync(self) -> str:
        """Force all rows to disk; returns their chain."""
        with storage_errors(self.folder):
            self._file.sync()
        return self._file.chain

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _describe(layout: Layout, schedule: Schedule) -> str:
    """Return a line like `pipeline 2 x data 1, batch 4 x 2`: the sizes of the groups, rows x batches of a step."""
    tensor = f" x tensor {layout.tensor_size}" if layout.tensor_size > 1 else ""
    groups = f"pipeline {layout.pipeline_size} x data {layout.replicas}{tensor}"
    return f"{groups}, batch {schedule.batch_size} x {schedule.accumulate}"
