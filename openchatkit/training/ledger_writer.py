"""The ledger of a run, which rank 0 keeps: a row a step, all of them on disk before a checkpoint vouches for them."""

from datetime import datetime, timezone
from pathlib import Path

from loguru import logger

from openchatkit.distributed.layout import Layout
from openchatkit.formats import ledger
from openchatkit.storage import storage_errors
from openchatkit.training.setup import RunProgress
from openchatkit.training.step import Schedule, StepResult


class LedgerWriter:
    """Goes on with the ledger in `folder` behind `progress`, and says so if its rows are not those of the checkpoint.

    They still tell what they tell; but that each sample before was trained exactly once is proved no more.
    """

    def __init__(self, folder: Path, progress: RunProgress, layout: Layout, schedule: Schedule) -> None:
        self.folder = folder
        with storage_errors(folder):
            self._writer = ledger.LedgerFile(folder, progress.step)
        if progress.ledger not in (None, self._writer.chain):
            logger.warning(
                "{} is not the ledger of the checkpoint at step {}: tools/inspect_data.py --verify will not be able to "
                "prove what the steps up to there were trained on",
                folder / ledger.LEDGER,
                progress.step,
            )
        self._layout = _describe(layout, schedule)
        self._started = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def add(self, step: int, rows: int, result: StepResult) -> None:
        """Enter that `step`, counted from 1, was taken on `rows` samples."""
        first = (step - 1) * rows
        digest = f"{result.digest:016x}"
        entry = ledger.LedgerRow(step, first, rows, digest, result.applied, self._layout, self._started)
        with storage_errors(self.folder):
            self._writer.append(entry)

    def sync(self) -> str:
        """Force all rows to disk; returns their chain."""
        with storage_errors(self.folder):
            self._writer.sync()
        return self._writer.chain

    def close(self) -> None:
        self._writer.close()


def _describe(layout: Layout, schedule: Schedule) -> str:
    """`2 stages x 1 replica, batch 4 x 2`."""
    stages = "1 stage" if layout.stages == 1 else f"{layout.stages} stages"
    replicas = "1 replica" if layout.replicas == 1 else f"{layout.replicas} replicas"
    return f"{stages} x {replicas}, batch {schedule.batch_size} x {schedule.accumulate}"
