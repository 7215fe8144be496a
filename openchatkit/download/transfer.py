"""The one loop that brings a file from elsewhere: it resumes, retries, checks, and only then gives the file its name.

What has come lies in `.NAME.part` beside the final name, and `.NAME.part.json` says of which version of the file it is.
A run that dies, however it dies, leaves both, and the next one asks for the missing bytes alone. How bytes are asked
for is the business of `http`, `s3`, `hub` and `local`, each of which makes `Remote`s.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from openchatkit import progress
from openchatkit.download.digests import Digest, mismatch
from openchatkit.download.patience import Patience, TransientError
from openchatkit.download.places import (
    Note,
    place,
    read_note,
    write_note,
)
from openchatkit.errors import UserError
from openchatkit.storage import check_room, format_bytes, hold_lock, lock_path, replace_file, storage_errors, write_text


@dataclass(frozen=True)
class Answer:
    """What a server sends: the bytes of a file from `start` on, and what it says of the whole file."""

    start: int
    size: int | None  # bytes of the whole file
    version: str | None  # sent back when the rest is asked for, so that it is the rest of the same file
    pieces: Iterator[bytes]
    digests: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class Remote:
    """A file that is somewhere else. What is known of it before it is asked for is None or empty otherwise."""

    name: str  # under which it is kept, with the subfolders it goes into
    address: str  # for messages and notes: without user, password and query
    open: Callable[[int, str | None], AbstractContextManager[Answer]]  # (first byte, version) -> the bytes from there
    size: int | None = None
    version: str | None = None
    digests: tuple[Digest, ...] = ()


def bring(remote: Remote, folder: Path, *, patience: Patience, noted: bool = True) -> Path:
    """The path of the file in `folder`, where it is brought to unless it is there already.

    Without `noted` no note is left beside it, for a folder that is somebody else's.
    UserError, Interrupted: refused, too large for the disk, other bytes than were promised, or nobody answers.
    """
    path = place(folder, remote.name)
    with storage_errors(path, "it goes on from what has come", every=True):
        # First without a lock: what is there is of use in a folder where nobody may write.
        if _is_noted(path, remote):
            return path
        with hold_lock(lock_path(path), f"{remote.address} is fetched by another process: waiting for it"):
            if not _is_there(path, remote, noted):
                _bring(remote, path, patience, noted)
    return path


def _title(remote: Remote) -> str:
    return remote.address.rsplit("/", 1)[-1]


def missing(remote: Remote, folder: Path) -> int:
    """The bytes of a file that are still to come, as far as its size is known."""
    path = place(folder, remote.name)
    if path.is_file() and path.stat().st_size == remote.size:
        return 0
    part = _partial_path(path)
    return max(0, (remote.size or 0) - (part.stat().st_size if part.is_file() else 0))


def _is_noted(path: Path, remote: Remote) -> bool:
    """Whether, by its note, the file under the final name is the one that `remote` stands for."""
    note = read_note(path)
    if note is None or note.address != remote.address or remote.version not in (None, note.version):
        return False
    try:
        return path.stat().st_size == note.size
    except FileNotFoundError:
        return False


def _is_there(path: Path, remote: Remote, noted: bool) -> bool:
    """Whether the file under the final name is the one that `remote` stands for."""
    if not path.exists():
        return False
    if _is_noted(path, remote):
        return True
    note, size = read_note(path), path.stat().st_size
    if note is None:
        if not remote.digests:
            raise UserError(
                f"{path} is there already and did not come from {remote.address}: remove it, or pass another folder"
            )
        if remote.size not in (None, size) or mismatch(path, remote.digests, f"checking {path.name}"):
            logger.info("{} is not the file that {} holds: fetching it again", path, remote.address)
            return False
        if noted:
            write_note(path, Note(remote.address, remote.version, size))
        return True
    if note.address != remote.address:
        raise UserError(
            f"{path} is there already and came from {note.address}, not from {remote.address}: remove it, or pass "
            "another folder"
        )
    logger.info("{} was changed here or at {}: fetching it again", path, remote.address)
    return False


def _bring(remote: Remote, path: Path, patience: Patience, noted: bool) -> None:
    part = _Partial(path, remote)
    again = False
    try:
        while True:
            _fill(part, remote, patience)
            wrong = mismatch(part.path, part.digests, f"checking {_title(remote)}")
            if wrong is None:
                break
            part.remove()
            expected, found = wrong
            if again:
                raise UserError(
                    f"{remote.address} came twice with other bytes than were promised: expected {expected}, found "
                    f"{found}; nothing is kept: check the digest, or ask whoever keeps the file"
                )
            logger.warning("{}: expected {}, found {}; fetching it once more", remote.address, expected, found)
            again, part = True, _Partial(path, remote)
        part.finish(noted)
    except KeyboardInterrupt:
        logger.info(
            "{}: {} are here and kept; the same command goes on from there", remote.address, format_bytes(part.length)
        )
        raise
    finally:
        if part.length:
            part.close()
        else:
            part.remove()


def _fill(part: "_Partial", remote: Remote, patience: Patience) -> None:
    """Ask for the missing bytes until none is missing."""
    most, failures, met = part.length, 0, False
    if part.length:
        logger.info("{}: going on at {}", remote.address, format_bytes(part.length))
    with progress.bar(
        part.size, _title(remote), unit="B", unit_scale=True, unit_divisor=1000, initial=part.length
    ) as bar:
        while not part.complete:
            try:
                with remote.open(part.length, part.version if part.length else None) as answer:
                    met = True
                    part.begin(answer)
                    bar.total, bar.n = part.size, part.length
                    for piece in answer.pieces:
                        part.add(piece)
                        bar.update(len(piece))
                    part.end()
            except TransientError as error:
                failures = 1 if part.length > most else failures + 1
                most = max(most, part.length)
                if error.anew or not (part.version or part.digests):
                    part.empty()
                patience.bear(error, failures, remote.address, met=met)


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


class _Partial:
    """What has come of a file, and of which version of it. The caller holds the lock of the final name."""

    def __init__(self, final: Path, remote: Remote) -> None:
        self.final, self.path = final, _partial_path(final)
        self._memory = self.path.with_name(f"{self.path.name}.json")
        self._remote = remote
        self.size, self.version, self.digests = remote.size, remote.version, remote.digests
        self._ended = False
        # Unbuffered, so that `length` is what is on the disk even when the disk is full.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._recall()
        self.length = os.fstat(self._file.fileno()).st_size
        if self.size is not None and self.length > self.size:
            self.empty()

    @property
    def complete(self) -> bool:
        return self.length == self.size if self.size is not None else self._ended

    def _recall(self) -> None:
        """Go on with what an earlier run left, if it is known to be of this version of this file; else begin anew."""
        try:
            memory: dict[str, Any] = json.loads(self._memory.read_text(encoding="utf-8"))
            version, size = memory["version"], memory["size"]
            digests = tuple(Digest(**entry) for entry in memory["digests"])
        except (FileNotFoundError, ValueError, TypeError, KeyError, AssertionError):
            version, size, digests = None, None, ()
        if self.version is not None:
            same = version == self.version
        else:
            # A version is sent along when the rest is asked for; a digest proves in the end what was joined.
            same = version is not None or bool(self.digests and set(self.digests) <= set(digests))
        if not same or self.size not in (None, size):
            self._file.truncate(0)
        elif self._file.tell():
            self.size, self.version = size, version
            self.digests = tuple(dict.fromkeys((*self.digests, *digests)))

    def begin(self, answer: Answer) -> None:
        """Take an answer: the rest of what is here, or the whole file, which then replaces what is here."""
        promised = self._remote.size
        if promised is not None and answer.start and answer.size not in (None, promised):
            raise TransientError(f"the server says {answer.size} bytes, {promised} were expected", anew=True)
        if answer.start and self._is_of_another(answer):
            raise TransientError("the file was changed while it was fetched", anew=True)
        if answer.start not in (0, self.length):
            raise TransientError(f"the server sends byte {answer.start}, byte {self.length} was asked for", anew=True)
        if answer.start == 0 or answer.size is not None:
            self.size = promised if promised is not None else answer.size
        if answer.start == 0:
            self.empty()
            self.version = self._remote.version or answer.version
        self.digests = tuple(dict.fromkeys((*self._remote.digests, *answer.digests)))
        if self.size is not None:
            needed = self.size - self.length
            check_room(self.final.parent, needed, self._remote.address, "make room and run again")
        digests = [{"kind": digest.kind, "value": digest.value} for digest in self.digests]
        write_text(self._memory, json.dumps({"version": self.version, "size": self.size, "digests": digests}) + "\n")

    def _is_of_another(self, answer: Answer) -> bool:
        """Whether a rest is plainly of another version of the file, from a server that heeds no If-Range."""
        if self._remote.version is not None:  # which is not always what a server calls the version
            return False
        pairs = ((answer.version, self.version), (answer.size, self.size))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def add(self, piece: bytes) -> None:
        if self.size is not None and self.length + len(piece) > self.size:
            raise TransientError(f"the server sends more than the {self.size} bytes of the file", anew=True)
        rest = memoryview(piece)
        while rest:
            written = self._file.write(rest)
            self.length += written
            rest = rest[written:]

    def end(self) -> None:
        """The answer is over: whole, unless fewer bytes have come than the file has."""
        if self.size is not None and self.length < self.size:
            raise TransientError(f"the server stopped after {self.length} of {self.size} bytes")
        self._ended = True

    def empty(self) -> None:
        """Forget what has come."""
        self._file.truncate(0)
        self.length, self.version = 0, self._remote.version

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self._memory.unlink(missing_ok=True)

    def finish(self, noted: bool) -> None:
        """Give the file its name."""
        self.close()
        if noted:
            # Never beside the note of another version, which would pass for this one if we died here.
            self.final.unlink(missing_ok=True)
            write_note(self.final, Note(self._remote.address, self.version, self.length))
        replace_file(self.path, self.final)
        self._memory.unlink(missing_ok=True)
