"""The two files of a batch: rows in, a line of JSON out for each, in order, and the resuming of a stopped run.

A line of the output carries the number of its row's line and a digest of the row and of the settings. A later run
checks them against its own input and settings, cuts off a line that was not written to its end, and resumes there.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from loguru import logger

from openchatkit import cli, jsonl
from openchatkit.errors import UserError
from openchatkit.inference import report
from openchatkit.inference.batch.questions import BatchRow, read_row
from openchatkit.storage import try_lock

_STANDARD = "-"
_BEGINNING = b'{"line": '


class BatchFiles:
    """An input and an output, opened: `done` rows are in the output, `failed` of them with an error, of `total`.

    `unaided` rows were answered although the search for passages failed. `total` is None for standard input. Raises
    UserError for files that cannot be read or written, or that do not belong together. Use it in a `with`, which closes
    the files.
    """

    def __init__(self, source: str, target: str, settings: Mapping[str, object]) -> None:
        self.done = 0
        self.failed = 0
        self.unaided = 0
        self._target = target
        self._settings = json.dumps(settings, sort_keys=True, default=str).encode()
        self._line = 0
        with contextlib.ExitStack() as opened:
            self._in = _open_input(source, opened)
            self.total = None if source == _STANDARD else _count(self._in)
            self._out: IO[Any] = sys.stdout if target == _STANDARD else self._resume(Path(target), source, opened)
            self._opened = opened.pop_all()

    def __enter__(self) -> "BatchFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def finished(self) -> bool:
        """Whether every row has its line."""
        return self.done == self.total

    def rows(self) -> Iterator[BatchRow]:
        """The rows that have no line in the output yet."""
        while row := read_row(self._in, self._line):
            self._line = row.number
            yield row

    def write(self, row: BatchRow, result: Mapping[str, object]) -> None:
        """Add the line of a row. Raises UserError when the disk is full."""
        text = report.to_json({"line": row.number, "row": self._digest(row), **result})
        try:
            self._out.write(text if self._out is sys.stdout else text.encode("utf-8"))
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            cli.discard_output(self._out)
            if self._out is sys.stdout:
                raise UserError(f"standard output cannot be written: {error.strerror}") from error
            raise UserError(f"{self._target} cannot be written: {error.strerror}; run again to go on") from error
        self.done += 1
        self._count_faults(result)

    def conclude(self) -> None:
        """Raise UserError when rows could not be answered; warn of rows for which the search failed."""
        if self.unaided:
            logger.warning(f'for {self.unaided} of {self.done} rows passages are missing: see "note" in their lines')
        if self.failed:
            raise UserError(f'{self.failed} of {self.done} rows could not be answered: see "error" in their lines')

    def _digest(self, row: BatchRow) -> str:
        return hashlib.sha256(self._settings + b"\n" + row.data).hexdigest()[:16]

    def _resume(self, target: Path, source: str, opened: contextlib.ExitStack) -> BinaryIO:
        """Open the output after its last whole line, and the input after the row of that line."""
        try:
            if source != _STANDARD and target.exists() and target.samefile(source):
                raise UserError(f"--output {target} is the input: expected another file")
            if target.exists() and not target.is_file():
                raise UserError(f"--output {target} is not a plain file: expected one, or - for standard output")
            lock = try_lock(target)
            if lock is None:
                raise UserError(f"another run is writing {target}: wait for it, or give another --output")
            opened.enter_context(lock)
            file = opened.enter_context(target.open("r+b"))
            end = 0
            while (line := file.readline()).endswith(b"\n"):
                self._check(line, target)
                end = file.tell()
            # Only an unfinished line of this program's own is cut off.
            if line and not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                raise _foreign(self.done + 1, target)
            file.truncate(end)
            file.seek(end)
        except OSError as error:
            raise UserError(f"--output {target} cannot be written: {error.strerror}") from error
        return file

    def _check(self, line: bytes, target: Path) -> None:
        row = next(self.rows(), None)
        result = jsonl.parse_object(line) or {}
        if row is None or result.get("line") != row.number or result.get("row") != self._digest(row):
            raise _foreign(self.done + 1, target)
        self.done += 1
        self._count_faults(result)

    def _count_faults(self, result: Mapping[str, object]) -> None:
        self.failed += "error" in result
        self.unaided += "note" in result


def _foreign(line: int, target: Path) -> UserError:
    return UserError(
        f"line {line} of {target} is not a reply to this input with these settings: give the input and flags that it "
        "was made with, and the same index, or another --output"
    )


def _open_input(source: str, opened: contextlib.ExitStack) -> BinaryIO:
    if source == _STANDARD:
        return sys.stdin.buffer
    try:
        return opened.enter_context(open(source, "rb"))
    except OSError as error:
        raise UserError(f"--batch {source} cannot be read: {error.strerror}") from error


def _count(file: BinaryIO) -> int:
    """Count the rows of a file, and rewind it."""
    try:
        count, line = 0, 0
        while row := read_row(file, line):
            count, line = count + 1, row.number
        file.seek(0)
    except OSError as error:
        raise UserError(f"--batch {file.name} cannot be read: {error.strerror}") from error
    return count
