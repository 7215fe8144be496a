"""Files and folders on this machine, copied by the same loop as files from elsewhere."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from openchatkit import storage
from openchatkit.download.digests import SHA256, Digest
from openchatkit.download.transfer import Answer, Remote
from openchatkit.errors import UserError

_PIECE = 1 << 20


def remotes(name: str, *, sha256: str | None = None) -> list[Remote]:
    """Return the file `name`, or all files of the folder `name` but hidden ones; UserError when there is neither."""
    path = Path(name).expanduser().absolute()
    if os.path.isfile(path):  # which, unlike the path's own, is False for a name that is too long
        return [_remote(path, path.name, sha256)]
    if not os.path.isdir(path):
        raise UserError(f"{name}: no such file or folder")
    return [_remote(file, file.relative_to(path).as_posix(), None) for file in sorted(_files(path))]


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones; UserError for a subfolder that cannot be read."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for name, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found = (Path(name, each) for each in files if not each.startswith("."))
        yield from (path for path in found if path.is_file())


def _remote(path: Path, name: str, sha256: str | None) -> Remote:
    stat = path.stat()
    version = _version(path, stat)

    @contextlib.contextmanager
    def open_at(start: int, _: str | None) -> Iterator[Answer]:
        try:
            file = open(path, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        with file:
            file.seek(start)
            _check_version(file, path, version)
            yield Answer(start, stat.st_size, version, _pieces(file, path, version))

    digests = (Digest(SHA256, sha256),) if sha256 else ()
    return Remote(name, str(path), open_at, size=stat.st_size, version=version, digests=digests)


def _version(path: Path, stat: os.stat_result) -> str:
    return "-".join(map(str, storage.stamp(path, stat)))


def _check_version(file: BinaryIO, path: Path, version: str) -> None:
    if _version(path, os.fstat(file.fileno())) != version:
        raise UserError(f"{path} was changed while it was copied: run again when it is complete")


def _pieces(file: BinaryIO, path: Path, version: str) -> Iterator[bytes]:
    try:
        while piece := file.read(_PIECE):
            yield piece
        _check_version(file, path, version)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
