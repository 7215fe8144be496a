"""Where a fetched file goes, who may write there, and the note beside it of what it is a copy of.

The note is `.NAME.fetched.json`: the address and the version that a file came from, its size, and the files that it was
unpacked into, if it was. It is what tells a file that need not be fetched again from a stranger of the same name.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from loguru import logger

from openchatkit.errors import UserError
from openchatkit.paths import write_text


@dataclass(frozen=True)
class Note:
    """What lies beside a fetched file: where it came from, and its size in bytes."""

    address: str
    version: str | None
    size: int
    unpacked: dict[str, int] = field(default_factory=dict)  # path below the file's folder -> size


def place(folder: Path, name: str) -> Path:
    """The path of the file `name`, which may name subfolders, in `folder`; UserError if it would not lie there."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise UserError(f"{name!r} leads outside the folder it is meant for: do not trust where it comes from")
    return Path(folder, *parts)


def read_note(path: Path) -> Note | None:
    """The note beside a file, or where the file was before it was unpacked."""
    try:
        return Note(**json.loads(_note(path).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_note(path: Path, note: Note) -> None:
    """Write a file's note, atomically."""
    write_text(_note(path), json.dumps(asdict(note)) + "\n")


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.fetched.json")


def check_room(folder: Path, needed: int, what: str, advice: str = "make room") -> None:
    """UserError when `needed` bytes do not fit on the disk of `folder`, which need not be there yet."""
    folder = folder.absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"{what}: {amount(needed)} are needed and {folder} has room for {amount(free)}: {advice}")


def amount(size: int) -> str:
    """A number of bytes as people say it: `1.4 GB`, `300 kB`, `12 bytes`."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"


@contextlib.contextmanager
def held(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of `path`, which need not be there; log `waiting` and wait while another process has it.

    The system frees the lock when its holder dies, however it dies. No lock file stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        file = open(lock, "w")  # noqa: SIM115 - the open file is the lock
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us removed the file that we have locked: whoever comes next would lock another one.
            if _same(file.fileno(), lock):
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


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def storage_errors(path: Path, full: str) -> Iterator[None]:
    """Turn what the file system refuses into a UserError about `path`; `full` is what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            says = f"the disk is full: {full}"
        elif error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
            says = "its file system has no file locks: use another one"
        elif error.errno is None:
            raise
        else:
            says = f"cannot be written: {error.strerror}"
        raise UserError(f"{path}: {says}") from error
