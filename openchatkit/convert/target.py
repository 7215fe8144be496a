"""The folder that a conversion writes: one writer at a time, enough room, and never half a result under its name."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.formats.tensor_file import storage_errors
from openchatkit.storage import sync


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it; UserError when another process does."""
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


def check_room(folder: Path, needed: int) -> None:
    """UserError when the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or use another disk"
        )


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place on success, replacing what is there; else it is removed.

    A kill leaves the temporary folder, which the next run removes.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    replaced = path.with_name(f".{path.name}.old")
    with locked(temporary), storage_errors(path):
        try:
            for entry in temporary.iterdir():
                entry.unlink()
            yield temporary
            sync(temporary)
            shutil.rmtree(replaced, ignore_errors=True)
            if path.exists():
                os.rename(path, replaced)
            os.rename(temporary, path)
            sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
