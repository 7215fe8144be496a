"""ledger.jsonl: the samples that each step of a training run was taken on, and a digest of their contents.

A row is {"step", "first", "count", "digest", "applied", "layout", "started"}: step (counted from 1) was taken on the
samples first to first + count - 1, whose contents sum up to `digest` (16 hexadecimal digits, see `data.batch`), by a
run in this layout that had been started at that time; `applied` is false where the gradient was not finite, so that the
step changed no weight. When a run resumes from a checkpoint, rows of later steps are dropped, like their weights.
`chain` of the rows up to a checkpoint's step stands in its state.json, so that the two cannot be of different runs.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from openchatkit import jsonl
from openchatkit.errors import UserError
from openchatkit.storage import sync_file, write_text

LEDGER = "ledger.jsonl"
EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class LedgerRow:
    """One step's row."""

    step: int
    first: int
    count: int
    digest: str
    applied: bool
    layout: str
    started: str


class LedgerFile:
    """The ledger of a run that continues after `last_step`, to add rows to; see `cut`. `chain` is that of all rows."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self.chain = cut(folder, last_step)
        # Line-buffered: a killed process loses no row.
        self._file = open(folder / LEDGER, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by `close`

    def append(self, entry: LedgerRow) -> None:
        """Add a row; it is on the disk for certain after `sync`."""
        self._file.write(_line(entry))
        self.chain = chain([entry], self.chain)

    def sync(self) -> None:
        """Force the rows to disk: called before the checkpoint that vouches for them is published."""
        sync_file(self._file)

    def close(self) -> None:
        # Only a row that failed is still buffered, and `append` has raised its error.
        with contextlib.suppress(OSError):
            self._file.close()


def read(folder: Path) -> list[LedgerRow]:
    """Return all rows, none when there is no file; a cut last line is skipped, UserError for any other bad line."""
    entries = _entries(folder)
    for number, entry in enumerate(entries[:-1], 1):
        if entry is None:
            raise UserError(f"{folder / LEDGER}:{number} is damaged: the ledger no longer proves anything")
    return [entry for entry in entries if entry is not None]


def cut(folder: Path, last_step: int) -> str:
    """Drop the rows of steps after `last_step`, and bad ones; return the chain of the others.

    A crash of the machine may damage rows that were not synced; they are after the last checkpoint. Damage to an older
    row shows in the chain.
    """
    kept = [entry for entry in _entries(folder) if entry is not None and entry.step <= last_step]
    write_text(folder / LEDGER, "".join(map(_line, kept)))
    return chain(kept)


def chain(entries: Iterable[LedgerRow], start: str = EMPTY) -> str:
    """SHA-256 of the rows' bytes, each row hashed together with the value before it, from `start`."""
    for entry in entries:
        start = hashlib.sha256(f"{start}{json.dumps(asdict(entry))}".encode()).hexdigest()
    return start


def _line(entry: LedgerRow) -> str:
    return json.dumps(asdict(entry)) + "\n"


def _entries(folder: Path) -> list[LedgerRow | None]:
    """Return a row for each line, None where it holds none."""
    try:
        return list(jsonl.read(folder / LEDGER, lambda row: LedgerRow(**row), lambda *_: None))
    except FileNotFoundError:
        return []
