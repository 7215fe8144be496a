"""The one download loop: it resumes, retries, checks, and only then gives the file its name.

Received bytes lie in `.NAME.part` beside the final name, and `.NAME.part.json` says which version of the file they are
of. A run that dies leaves both, and the next one asks for the missing bytes alone. `http`, `s3`, `hub` and `local` know
how to ask for bytes: each makes `Remote`s.
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
from openchatkit.download.retry import RetryPolicy, TransientError
from openchatkit.download.sidecar import (
    Sidecar,
    read_sidecar,
    storage_path,
    write_sidecar,
)
from openchatkit.errors import UserError
from openchatkit.storage import (
    check_room,
    format_bytes,
    hold_lock,
    lock_path,
    replace_file,
    storage_errors,
    sync,
    write_text,
)


@dataclass(frozen=True)
class Answer:
    """A server's answer: the bytes of a file from `start` on, and facts about the whole file."""

    start: int
    size: int | None  # bytes of the whole file
    version: str | None  # sent back when the rest is asked for, so that it is the rest of the same file
    pieces: Iterator[bytes]
    digests: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class Remote:
    """A file that is somewhere else; facts that are unknown before it is asked for are None or empty."""

    name: str  # under which it is kept, with the subfolders it goes into
    address: str  # for messages and sidecars: without user, password and query
    open: Callable[[int, str | None], AbstractContextManager[Answer]]  # (first byte, version) -> the bytes from there
    size: int | None = None
    version: str | None = None
    digests: tuple[Digest, ...] = ()


def download_file(remote: Remote, folder: Path, *, retry: RetryPolicy, sidecar: bool = True) -> Path:
    """Download a file into `folder`, unless it is there already, and return its path.

    No sidecar is written unless `sidecar`, for a folder of another program.
    UserError, Interrupted: refused, too large for the disk, other bytes than were promised, or no answer.
    """
    path = storage_path(folder, remote.name)
    with storage_errors(path, "it goes on from what has come", every=True):
        # First without a lock: a file that is there can be used in a folder that cannot be written.
        if _has_sidecar_of(path, remote):
            return path
        with hold_lock(lock_path(path), f"{remote.address} is fetched by another process: waiting for it"):
            if not _is_there(path, remote, sidecar):
                _download(remote, path, retry, sidecar)
    return path


def _title(remote: Remote) -> str:
    return remote.address.rsplit("/", 1)[-1]


def missing_bytes(remote: Remote, folder: Path) -> int:
    """Return how many bytes of a file are still to be downloaded, as far as its size is known."""
    path = storage_path(folder, remote.name)
    if path.is_file() and path.stat().st_size == remote.size:
        return 0
    part = _partial_path(path)
    return max(0, (remote.size or 0) - (part.stat().st_size if part.is_file() else 0))


def _has_sidecar_of(path: Path, remote: Remote) -> bool:
    """Return whether, by its sidecar, the file under the final name is the one that `remote` stands for."""
    sidecar = read_sidecar(path)
    if sidecar is None or not sidecar.matches(remote.address, remote.version):
        return False
    try:
        return path.stat().st_size == sidecar.size
    except FileNotFoundError:
        return False


def _is_there(path: Path, remote: Remote, sidecar: bool) -> bool:
    """Return whether the file under the final name is the one that `remote` stands for."""
    if not path.exists():
        return False
    if _has_sidecar_of(path, remote):
        return True
    found, size = read_sidecar(path), path.stat().st_size
    if found is None:
        if not remote.digests:
            raise UserError(
                f"{path} is there already and did not come from {remote.address}: remove it, or pass another folder"
            )
        if remote.size not in (None, size) or mismatch(path, remote.digests, f"checking {path.name}"):
            logger.info("{} is not the file that {} holds: fetching it again", path, remote.address)
            return False
        if sidecar:
            write_sidecar(path, Sidecar(remote.address, remote.version, size))
        return True
    if found.address != remote.address:
        raise UserError(
            f"{path} is there already and came from {found.address}, not from {remote.address}: remove it, or pass "
            "another folder"
        )
    logger.info("{} was changed here or at {}: fetching it again", path, remote.address)
    return False


def _download(remote: Remote, path: Path, retry: RetryPolicy, sidecar: bool) -> None:
    part = _Partial(path, remote)
    again = False
    try:
        while True:
            _fill(part, remote, retry)
            wrong = mismatch(part.path, part.digests, f"checking {_title(remote)}")
            if wrong is None:
                break
            part.remove()
            expected, found = wrong
            if again:
                raise UserError(
                    f"{remote.address} came twice with other bytes than were promised: expected {expected}, found "
                    f"{found}; nothing is kept: check the digest, or ask the publisher of the file"
                )
            logger.warning("{}: expected {}, found {}; fetching it once more", remote.address, expected, found)
            again, part = True, _Partial(path, remote)
        part.finish(sidecar)
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


def _fill(part: "_Partial", remote: Remote, retry: RetryPolicy) -> None:
    """Ask for the missing bytes until the file is complete."""
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
                if error.restart or not (part.version or part.digests):
                    part.empty()
                retry.backoff(error, failures, remote.address, reached=met)


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


class _Partial:
    """The received bytes of a file, and which version of it they are. The caller holds the lock of the final name."""

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
        """Resume from what an earlier run left, if it is known to be of this version of this file; else start over."""
        try:
            memory: dict[str, Any] = json.loads(self._memory.read_text(encoding="utf-8"))
            version, size = memory["version"], memory["size"]
            digests = tuple(Digest(**entry) for entry in memory["digests"])
        except (FileNotFoundError, ValueError, TypeError, KeyError, AssertionError):
            version, size, digests = None, None, ()
        if self.version is not None:
            same = version == self.version
        else:
            # A version is sent along when the rest is asked for; a digest proves the joined file in the end.
            same = version is not None or bool(self.digests and set(self.digests) <= set(digests))
        if not same or self.size not in (None, size):
            self._file.truncate(0)
        elif self._file.tell():
            self.size, self.version = size, version
            self.digests = tuple(dict.fromkeys((*self.digests, *digests)))

    def begin(self, answer: Answer) -> None:
        """Accept an answer: the rest of the file, or the whole file, which then replaces the bytes received so far."""
        promised = self._remote.size
        if promised is not None and answer.start and answer.size not in (None, promised):
            raise TransientError(f"the server says {answer.size} bytes, {promised} were expected", restart=True)
        if answer.start and self._is_of_another(answer):
            raise TransientError("the file was changed while it was fetched", restart=True)
        if answer.start not in (0, self.length):
            raise TransientError(
                f"the server sends byte {answer.start}, byte {self.length} was asked for", restart=True
            )
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
        """Return whether the rest is plainly of another version of the file, from a server that ignores If-Range."""
        if self._remote.version is not None:  # which is not always what a server calls the version
            return False
        pairs = ((answer.version, self.version), (answer.size, self.size))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def add(self, piece: bytes) -> None:
        if self.size is not None and self.length + len(piece) > self.size:
            raise TransientError(f"the server sends more than the {self.size} bytes of the file", restart=True)
        rest = memoryview(piece)
        while rest:
            written = self._file.write(rest)
            self.length += written
            rest = rest[written:]

    def end(self) -> None:
        """Note the end of the answer; TransientError when fewer bytes have come than the file has."""
        if self.size is not None and self.length < self.size:
            raise TransientError(f"the server stopped after {self.length} of {self.size} bytes")
        self._ended = True

    def empty(self) -> None:
        """Drop the received bytes."""
        self._file.truncate(0)
        self.length, self.version = 0, self._remote.version

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self._memory.unlink(missing_ok=True)

    def finish(self, sidecar: bool) -> None:
        """Give the file its name."""
        self.close()
        sync(self.path)  # while the older file is there: a disk that refuses it leaves that as it is
        if sidecar:
            # Never beside the sidecar of another version, which would pass for this one if we died here.
            self.final.unlink(missing_ok=True)
            write_sidecar(self.final, Sidecar(self._remote.address, self.version, self.length))
        replace_file(self.path, self.final)
        self._memory.unlink(missing_ok=True)
