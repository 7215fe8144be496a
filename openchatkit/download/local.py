"""Files and folders on this machine: copied by the same loop as everything else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openchatkit.download.digests import SHA256, Digest
from openchatkit.download.transfer import Answer, Remote
from openchatkit.errors import UserError

_PIECE = 1 << 20


def remotes(name: str, *, sha256: str | None = None) -> list[Remote]:
    """The file `name`, or all files of the folder `name` but hidden ones; UserError when there is neither."""
    path = Path(name).expanduser().absolute()
    if path.is_file():
        return [_remote(path, path.name, sha256)]
    if not path.is_dir():
        raise UserError(f"{name}: no such file or folder")
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    names = [file.relative_to(path) for file in files]
    return [
        _remote(path / name, name.as_posix(), None)
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    ]


def _remote(path: Path, name: str, sha256: str | None) -> Remote:
    stat = path.stat()
    version = f"{stat.st_size}-{stat.st_mtime_ns}"

    @contextlib.contextmanager
    def open_at(start: int, _: str | None) -> Iterator[Answer]:
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        with file:
            file.seek(start)
            yield Answer(start, stat.st_size, version, _pieces(file, path))

    digests = (Digest(SHA256, sha256),) if sha256 else ()
    return Remote(name, str(path), open_at, size=stat.st_size, version=version, digests=digests)


def _pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        while piece := file.read(_PIECE):
            yield piece
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
