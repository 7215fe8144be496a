"""Copies of a run's checkpoints in S3-compatible storage, made by a thread of rank 0 beside the steps.

A checkpoint is there when its manifest is, which comes last, as `latest` comes after that. One that is there is noted
so in its folder, and only then may it be deleted here. What a run leaves undone, the next one of the folder does.
`latest` follows that of the run, back as well.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from openchatkit.distributed.layout import Layout
from openchatkit.distributed.processes import note_stop
from openchatkit.download.s3_upload import S3Folder
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats import checkpoint
from openchatkit.storage import storage_errors

_LOOK_SECONDS = 1.0  # between two looks for requests to stop, while all wait


class Uploader:
    """Uploads the checkpoints in `root`, from the oldest, to `prefix`, s3://bucket/prefix.

    UserError without keys or boto3; whether the storage takes anything, `check_upload` has seen before.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        self._root = root
        self._stopped = threading.Event()
        self._folder = S3Folder(prefix, stopped=self._stopped)
        self._latest: int | None = None  # what `latest` in the storage says, once it was written here
        self._settling = threading.Lock()
        self._changed = threading.Condition()
        self._wanted = self._done = 0  # how often `wake` was called, and how many of these calls were answered
        self._problem: Exception | None = None  # of the last answer
        self._thread = threading.Thread(target=self._answer, name="uploads", daemon=True)
        self._thread.start()

    @property
    def storage(self) -> str:
        """The storage, as checkpoints that are uploaded are noted to be in it."""
        return self._folder.storage

    def wake(self) -> None:
        """Let the thread look for checkpoints that are not uploaded."""
        with self._changed:
            self._wanted += 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait up to so many seconds for what `wake` asked for; returns whether it is done, or raises its error."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._done == self._wanted, timeout=seconds)
            problem = self._problem if done else None
        if isinstance(problem, UserError):
            raise type(problem)(f"{problem}; checkpoints are whole in {self._root}, and the same command uploads them")
        if problem is not None:
            raise problem
        return done

    def close(self) -> None:
        """Stop after the parts that are under way; nothing waits for them."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()

    def _answer(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._done < self._wanted or self._stopped.is_set())
                wanted = self._wanted
            if self._stopped.is_set():
                return
            problem: Exception | None
            try:
                problem = self._upload_all()
            except Exception as error:  # for the main thread, which raises it in `wait`
                problem = error
            with self._changed:
                self._done, self._problem = wanted, problem
                self._changed.notify_all()

    def _upload_all(self) -> Exception | None:
        """Upload what is not there yet; returns the first error, which `wait` raises, and goes on with the others."""
        problems: list[Exception] = []
        with storage_errors(self._root, every=True):
            paths = checkpoint.list_to_upload(self._root, self.storage)
        for path in paths:
            if self._stopped.is_set():
                break
            try:
                self._upload(path)
            except Exception as error:
                problems.append(error)
                logger.warning("{} is not uploaded, and is kept and tried again later: {}", path, error)
        if not paths:
            self.settle_latest()  # as after each upload
        return problems[0] if problems else None

    def _upload(self, path: Path) -> None:
        started = time.perf_counter()
        with storage_errors(path, every=True):
            records = checkpoint.list_files(path)
            for record in records:
                self._folder.put_file(f"{path.name}/{record.name}", path / record.name, sha256=record.sha256)
            checkpoint.mark_uploaded(path, self.storage, records[-1])
        self.settle_latest()
        logger.info("uploaded {} to {} in {:.0f} s", path.name, self._folder.address, time.perf_counter() - started)

    def settle_latest(self) -> None:
        """Let `latest` in the storage name what a run would go on from, as far as that is there."""
        with self._settling, storage_errors(self._root, every=True):
            step = self._find_latest()
            if step is not None and step != self._latest:
                self._folder.put_text(checkpoint.LATEST, f"{step}\n")
                self._latest = step

    def _find_latest(self) -> int | None:
        """Return the newest step that the storage has, up to the one that a run would go on from here.

        A checkpoint that arrives late is older than others there, and one that a run has gone back from is never it.
        """
        steps = {step: checkpoint.find(self._root, step) for step in checkpoint.list_steps(self._root)}
        named = checkpoint.read_latest(self._root)
        last = max(steps, default=None) if named is None else checkpoint.parse_step(named.name)
        there = [
            step for step, path in steps.items() if path is not None and checkpoint.is_uploaded(path, self.storage)
        ]
        return max((step for step in there if last is None or step <= last), default=None)


def finish_uploads(uploader: Uploader | None, layout: Layout, requests: Sequence[int]) -> None:
    """Wait, with all ranks, until rank 0 has uploaded all there is; only that rank has an `uploader`.

    Raises its error on all ranks, and Interrupted where some rank has `requests` to stop.
    """
    layout.activity.begin("uploading")
    while True:
        outcomes, errors = layout.attempt(lambda: (uploader is None or uploader.wait(_LOOK_SECONDS), len(requests) > 0))
        if errors:
            raise errors[0]
        if all(done for done, _ in outcomes):
            return
        if any(stop for _, stop in outcomes):
            note_stop("uploads")
            raise Interrupted("stopped before all checkpoints were uploaded: the same command uploads the others")


def check_upload(prefix: str, config: str) -> None:
    """Write the text of a model's config.json to `prefix`; UserError or Interrupted where that fails."""
    try:
        S3Folder(prefix).put_text(checkpoint.CONFIG, config)
    except UserError as error:
        raise type(error)(f"--checkpoint-upload-prefix: {error}") from error
