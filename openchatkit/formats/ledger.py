"""ledger.jsonl: which samples each step of a training run was taken on, and a digest of what they held.

A row is {"step", "first", "count", "digest", "layout", "started"}: step (counted from 1) was taken on samples first to
first + count - 1, whose contents sum up to `digest` (16 hexadecimal digits, see `data.batch`), by a run in this layout
that had been started at that time. When a run resumes from a checkpoint, rows of later steps go: their weights are
gone as well. `chain` of the rows up to a checkpoint's step stands in its state.json, so that the two cannot be of
different runs.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.paths import atomic_path

LEDGER = "ledger.jsonl"
EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Entry:
    """One step's row."""

    step: int
    first: int
    count: int
    digest: str
    layout: str
    started: str


def append(folder: Path, entry: Entry) -> None:
    """Add a row; it is on its way to the disk when this returns, and on it after `sync`."""
    with open(folder / LEDGER, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def sync(folder: Path) -> None:
    """Force the rows to disk: called before the checkpoint that vouches for them is published."""
    with open(folder / LEDGER, "a", encoding="utf-8") as file:
        os.fsync(file.fileno())


def read(folder: Path) -> list[Entry]:
    """All rows, none when there is no file; a last line that a kill has cut is left out, any other broken one is a
    UserError."""
    path = folder / LEDGER
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}:{number} is damaged: the ledger proves nothing any more") from error
    return entries


def cut(folder: Path, last_step: int) -> str:
    """Drop the rows of steps after `last_step`, and a line cut short; returns the chain of those that stay."""
    kept = [entry for entry in read(folder) if entry.step <= last_step]
    with atomic_path(folder / LEDGER) as temporary:
        temporary.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in kept), encoding="utf-8")
    return chain(kept)


def chain(entries: Iterable[Entry], start: str = EMPTY) -> str:
    """SHA-256 of the rows' bytes, each row hashed together with the value before it, from `start`."""
    for entry in entries:
        start = hashlib.sha256(f"{start}{json.dumps(asdict(entry))}".encode()).hexdigest()
    return start
