"""Files on disk: whole or not at all, one writer at a time, enough room, and errors that say what the disk refused."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from loguru import logger

from openchatkit.errors import UserError

# A file changed twice within a tick of its file system's clock has one stamp for both; the coarsest tick is 2 seconds.
SETTLED_SECONDS = 2.0
Stamp = list[int]


class FullDiskError(UserError):
    """A disk, or the user's share of it, that has no room."""


_FULL = (errno.ENOSPC, errno.EDQUOT)

_REASONS = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EFBIG: "the file size limit is reached: see `ulimit -f`",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder you may write to",
    errno.EEXIST: "part of the path is a file: choose another folder",
    errno.ENOTDIR: "part of the path is a file: choose another folder",
    errno.EIO: "the disk reports an error: check it",
    errno.ESTALE: "the folder of another machine is gone or was replaced: mount it again",
    errno.ENOLCK: "its file system has no file locks: choose another folder",
    errno.EOPNOTSUPP: "its file system has no file locks: choose another folder",
}


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced to disk and renamed, on failure removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # Not mkstemp, whose files only their owner can read: asking for the umask changes it, for every other thread, too.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place on success, replacing what is there; else it is removed.

    A kill leaves the temporary folder, which the next run removes. UserError as `own_folder` and `storage_errors`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with own_folder(temporary), storage_errors(path):
        try:
            for entry in temporary.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield temporary
            replace_folder(temporary, path)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def replace_file(temporary: Path, path: Path) -> None:
    """Sync a whole file and give it its name, in place of the file that has it."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def replace_folder(temporary: Path, path: Path) -> None:
    """Give a whole folder its name, in place of the folder that has it, which a kill may leave as `.NAME.old`."""
    sync(temporary)
    replaced = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(path, replaced)
    os.rename(temporary, path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_cached(path: Path) -> None:
    """Let the system forget a synced file's bytes, where it can, so that they are next read from the disk itself."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def sync_file(file: IO[Any]) -> None:
    """Force to disk what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


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
    """Return the lock file of a file or folder, beside it; never `.lock`, which a folder may have for itself."""
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def hold_lock(lock: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file; log `waiting` and wait while another process has it. The file is removed at the end.

    The system frees it when its holder dies, however it dies.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = try_lock(lock)
        if file is None:
            logger.info(waiting)
            file = open(lock, "a")  # noqa: SIM115 - the open file is the lock
        try:
            if lock_open_file(file, lock):
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


def lock_open_file(file: IO[Any], path: Path) -> bool:
    """Wait for the lock of an open file; return whether it still is the file at `path`.

    The holder before may have removed or replaced it: the next process would lock another one.
    """
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it; UserError while another process has it locked."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}: wait for it, or end it and run again") from None
        yield
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def check_room(folder: Path, needed: int, what: str, advice: str = "make room") -> None:
    """FullDiskError when `needed` bytes do not fit on the disk of `folder`, which need not exist yet."""
    if needed > (free := free_bytes(folder)):
        raise FullDiskError(
            f"{what}: {format_bytes(needed)} are needed and {folder.absolute()} has room for {format_bytes(free)}: "
            f"{advice}"
        )


def format_bytes(size: int) -> str:
    """Return a number of bytes for a message: `1.4 GB`, `300.0 kB`, `12 bytes`."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


def check_writable(path: Path) -> None:
    """Raise UserError unless a file of this path could be written now; its folder is made. The file stays as it is."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: expected the name of a file to write")
    with storage_errors(path, every=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def storage_errors(what: Path | str, then: str = "", *, every: bool = False) -> Iterator[None]:
    """Turn errors of a disk or of its permissions into a UserError, FullDiskError for a full one.

    `then` says what another run does. Errors that may be defects pass unless `every` error of the system is one of the
    disk here.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or not (every or error.errno in _REASONS):
            raise
        reason = _REASONS.get(error.errno) or f"{error.strerror}: choose another path"
        tail = f": {then}" if then else ""
        if every and error.filename is not None and str(error.filename) not in str(what):
            tail += f" (the error is about {error.filename})"
        kind = FullDiskError if error.errno in _FULL else UserError
        raise kind(f"cannot write {what}: {reason}, then run the same command again{tail}") from error


def stamp(path: Path, stat: os.stat_result | None = None) -> Stamp:
    """Return [bytes, time of modification, time of change, inode] of a file: a changed file has another stamp.

    tar, rsync and git set the time of modification to what they like; nobody can set the time of change.
    """
    found = stat or os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def is_settled(stamp: Stamp) -> bool:
    """Return whether a file that is changed from now on is bound to get another stamp.

    It is not if the last change was a moment ago, lies in the future, or is not known: some file systems keep no time
    of change. The content of such a file must be read.
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
