"""The files of one or several token stores that are built together, and how far they are known to be on disk.

Every so often the files are forced to disk and a note says how far they reach. The next build drops what lies after
that and continues, so the files come out the same, byte for byte, however often a build was killed. Rows that cannot be
used stop it, or are listed, each with its line and the reason. The callers, `data.stores.build` and
`tools.preprocess.work_folder`, choose the folder and the form of the note, and make documents of rows.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from loguru import logger

from openchatkit import storage
from openchatkit.data.records.raw_row import START, Mark
from openchatkit.data.stores.pace import Pace
from openchatkit.data.stores.tokenise import Tokenised
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats.cached_store import quarantine_path
from openchatkit.formats.store_writer import StoreProgress, TokenStoreWriter

# The content of each store, by its key. Fields about the input (`rows` to `position`, quarantine) are equal in all.
Progress = Mapping[str, StoreProgress]


class BadRowsError(UserError):
    """Rows that cannot be used, where --bad-rows is "error"."""


def bad_row_error(file: str | Path, number: int, reason: str) -> BadRowsError:
    """Return the error that names the first row that cannot be used."""
    return BadRowsError(
        f"{file}:{number}: {reason}: mend or remove it, or pass --bad-rows quarantine, which sets such rows aside"
    )


def is_resumable(error: BaseException) -> bool:
    """Return whether a build may continue after this error: it may not where the input itself is at fault."""
    return not isinstance(error, UserError) or isinstance(error, Interrupted | BadRowsError)


class StoreBuilder:
    """A context manager that holds open the stores `folder / key` for each of `keys`, complete when it is left.

    `progress` is what they hold. They continue at `resume`; where that is None or the files hold less, everything in
    the folder is deleted and they start from scratch. `write_note` keeps the progress that `save` hands it, in the
    folder. After Ctrl-C, or the death of a worker, the progress is saved.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[str],
        *,
        title: str,
        dtype: np.dtype,
        masked: bool,
        bad_rows: str,
        resume: Progress | None,
        write_note: Callable[[Progress], None],
        pace: Pace,
    ) -> None:
        self._folder = folder
        self._title = title
        self._bad_rows = bad_rows
        self._write_note = write_note
        self._pace = pace
        try:
            self._open(keys, dtype, masked, resume)
        except ValueError:  # files that hold less than was noted
            self._open(keys, dtype, masked, None)
        if self.input.rows:
            logger.info("{}: continues after row {:,}, where it was stopped", title, self.input.row)
        self._saved_tokens = self._tokens
        self._save_at = time.monotonic() + self._pace.save_seconds

    @property
    def input(self) -> StoreProgress:
        """The progress in the input: the fields that all stores share."""
        return next(iter(self.progress.values()))

    @property
    def _tokens(self) -> int:
        return sum(held.tokens for held in self.progress.values())

    def _open(self, keys: Sequence[str], dtype: np.dtype, masked: bool, resume: Progress | None) -> None:
        """Open the files at what was saved, or empty. ValueError: they hold less."""
        if resume is None:
            for path in self._folder.iterdir():
                path.unlink()
        self.progress = resume or dict.fromkeys(keys, StoreProgress())
        with contextlib.ExitStack() as files:
            self._quarantine = files.enter_context(open(quarantine_path(self._folder), "ab"))
            if self._quarantine.tell() < self.input.quarantine_size:
                raise ValueError(f"{quarantine_path(self._folder)} is cut short")
            self._quarantine.truncate(self.input.quarantine_size)
            self._writers: dict[str, TokenStoreWriter] = {}
            for key in keys:
                writer = TokenStoreWriter(
                    self._folder / key, dtype=dtype, masked=masked, resume=resume[key] if resume else None
                )
                self._writers[key] = files.enter_context(writer)
            self._files = files.pop_all()

    def add(
        self,
        rows: int,
        parts: Mapping[str, Tokenised],
        bad: Sequence[tuple[str, int, str]],
        *,
        mark: Mark = START,
        position: int = 0,
    ) -> None:
        """Append what the next `rows` rows became; `bad` are those that cannot be used, as (file, line, reason).

        `mark` and `position` are the place in the input then. BadRowsError at a bad row unless such are set aside.
        """
        if bad and self._bad_rows == "error":
            raise bad_row_error(*bad[0])
        listed = [json.dumps({"file": file, "line": line, "reason": reason}) + "\n" for file, line, reason in bad]
        lines = "".join(listed).encode()
        self._quarantine.write(lines)
        for key, part in parts.items():
            self._writers[key].add(part.tokens, part.sizes, part.mask)
        before = self.input
        common = replace(
            before,
            rows=before.rows + rows,
            row=mark.number,
            row_end=mark.end,
            position=position,
            quarantined=before.quarantined + len(bad),
            quarantine_size=before.quarantine_size + len(lines),
        )
        # In one step, last: Ctrl-C between the lines above leaves files that hold more than this says.
        self.progress = {
            key: replace(
                common,
                documents=writer.documents,
                tokens=writer.tokens,
                trained_tokens=writer.trained_tokens,
                excluded_tokens=writer.excluded_tokens,
                untrained=writer.untrained,
                spelled=self.progress[key].spelled + parts[key].spelled,
            )
            for key, writer in self._writers.items()
        }

    def is_save_due(self) -> bool:
        """Return whether enough is new, or the last save long enough ago, for another one."""
        return self._tokens - self._saved_tokens >= self._pace.save_tokens or time.monotonic() >= self._save_at

    def save(self) -> None:
        """Force the files to disk, then note how far they reach."""
        progress = self.progress
        for writer in self._writers.values():
            writer.sync()
        storage.sync_file(self._quarantine)
        self._write_note(progress)
        self._saved_tokens = self._tokens
        self._save_at = time.monotonic() + self._pace.save_seconds

    def __enter__(self) -> "StoreBuilder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._files:
                self.save()
            return
        with contextlib.suppress(OSError):  # the error in flight matters more
            try:
                if isinstance(error, KeyboardInterrupt | Interrupted) and self.input.rows:
                    logger.info("{}: stopped; the same command continues after row {:,}", self._title, self.input.row)
                    self.save()
            finally:
                self._files.__exit__(kind, error, trace)
