"""Files on disk: whole or not at all, one writer at a time, enough room, and what the disk refuses as one line."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from loguru import logger

# A file changed twice within a tick of its file system's clock has one stamp for both; the coarsest tick is 2 seconds.
SETTLED_SECONDS = 2.0
Stamp = list[int]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced to disk and renamed, on failure removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    # mkstemp makes files only their owner can read; give the mode an ordinary open() would have given.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file for this process until it is closed or the process ends, however it ends; None if another has it."""
    file = open(path, "a")  # noqa: SIM115 - the open file is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def lock_path(path: Path) -> Path:
    """The lock file of a file or folder, beside it; never `.lock`, which a folder may have for itself."""
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def hold_lock(lock: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file; log `waiting` and wait while another process has it. It does not stay behind.

    The system frees it when its holder dies, however it dies.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = try_lock(lock)
        if file is None:
            logger.info(waiting)
            file = open(lock, "a")  # noqa: SIM115 - the open file is the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us removed the file that we have locked: whoever comes next would lock another one.
            if _is_at(file, lock):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp(path: Path, stat: os.stat_result | None = None) -> Stamp:
    """Return [bytes, time of modification, time of change, inode] of a file: what tells that its content was changed.

    tar, rsync and git set the time of modification to what they like; nobody can set the time of change.
    """
    found = stat or os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def is_settled(stamp: Stamp) -> bool:
    """Return whether a file that is changed from now on is bound to get another stamp.

    It is not where the last change was a moment ago, lies in the future, or is not known: some file systems keep no
    time of change. What such a file holds is only told by reading it.
    """
    _, modified, changed, _ = stamp
    return changed > 0 and max(modified, changed) < time.time_ns() - SETTLED_SECONDS * 1e9


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    with open(path, "rb") as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()
