"""Unpack untrusted `.gz`, `.zst` and `.tar` files, and a tar in either.

Only regular files are made, under names that are checked here; links and devices are skipped. A name that leads outside
is an error, and so is more than the disk has room for. Everything is written under a temporary name: a truncated or
damaged stream leaves nothing.
"""

import contextlib
import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from loguru import logger

from openchatkit import progress
from openchatkit.download.sidecar import storage_path
from openchatkit.download.zstandard_stream import ZstandardStream
from openchatkit.errors import UserError
from openchatkit.libraries import tar_streams
from openchatkit.storage import format_bytes, free_bytes, hold_lock, lock_path, storage_errors, sync

PACKED = (".gz", ".tgz", ".zst", ".tar")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_PIECE = 1 << 20
_SPARE_BYTES = 1 << 26  # left free on the disk
_MOST_FILES = 1_000_000


def is_packed(path: Path) -> bool:
    """Return whether `unpack` knows the file, by its name."""
    return path.name.lower().endswith(PACKED)


def unpack(path: Path, destination: Path, *, strip: int = 0) -> list[Path]:
    """Unpack a file into a folder, replacing files that are there, and return the paths of its files.

    Without tar, the file keeps its name but for the ending. `strip` leading folders of the names in a tar are dropped.
    UserError: not a packed file, damaged or truncated, a name that leads outside, too large for the disk.
    """
    path, destination = Path(path), Path(destination)
    if not is_packed(path):
        raise UserError(f"{path} cannot be unpacked: expected a name in {', '.join(PACKED)}")
    temporary = destination / f".{path.name}.unpacked"
    with (
        storage_errors(destination, every=True),
        hold_lock(lock_path(temporary), f"{path.name} is unpacked by another process: waiting for it"),
    ):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            with _damage_errors(path), _open_contents(path, destination) as stream:
                if not path.stat().st_size:
                    raise EOFError("an empty file")
                names = _write_members(stream, path, temporary, strip)
            return [_move(temporary, destination, name) for name in names]
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_members(stream: "_LimitedStream", path: Path, folder: Path, strip: int) -> list[str]:
    """Write the packed files into `folder`, and return their names."""
    if path.name.lower().endswith(_TARS):
        return _untar(stream, path, folder, strip)
    name = path.name[: -len(path.suffix)]
    with open(storage_path(folder, name), "wb") as file:
        shutil.copyfileobj(stream, file, _PIECE)
    return [name]


def _untar(stream: "_LimitedStream", path: Path, folder: Path, strip: int) -> list[str]:
    # tarfile extracts nothing, so its data filter has no part in this: the names of members follow the rule of all
    # downloads, which refuses what the filter would rename.
    names: dict[str, None] = {}
    for number, (member, contents) in enumerate(tar_streams.read_members(stream)):
        if number >= _MOST_FILES:
            raise UserError(f"{path} holds more than {_MOST_FILES} files: it is not unpacked")
        if member.isdir():
            continue
        if contents is None or member.issparse():
            logger.warning("{}: {!r} is no plain file (a link or a device) and is left out", path.name, member.name)
            continue
        inside = storage_path(folder, member.name).relative_to(folder)
        name = "/".join(inside.parts[strip:])
        if not name:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as file:
            shutil.copyfileobj(contents, file, _PIECE)
        names[name] = None
    return list(names)


def _move(folder: Path, destination: Path, name: str) -> Path:
    target = storage_path(destination, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(folder / name)
    os.replace(folder / name, target)
    return target


@contextlib.contextmanager
def _damage_errors(path: Path) -> Iterator[None]:
    import zstandard

    try:
        yield
    except (EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): remove it and fetch it again") from error


@contextlib.contextmanager
def _open_contents(path: Path, destination: Path) -> Iterator["_LimitedStream"]:
    """Yield the decompressed bytes of a file, with a progress bar over the compressed ones."""
    room = free_bytes(destination) - _SPARE_BYTES
    suffix = path.suffix.lower()
    with (
        open(path, "rb") as file,
        progress.bar(path.stat().st_size, f"unpacking {path.name}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        if suffix in (".gz", ".tgz"):
            stream: tar_streams.Readable = gzip.GzipFile(fileobj=file)
        else:
            stream = ZstandardStream(file) if suffix == ".zst" else file
        yield _LimitedStream(stream, path, room, lambda: bar.update(file.tell() - bar.n))


class _LimitedStream:
    """A decompressed stream of at most `room` bytes; `seen` is called after each read."""

    def __init__(self, stream: tar_streams.Readable, path: Path, room: int, seen: Callable[[], object]) -> None:
        self._stream, self._path, self._room, self._seen = stream, path, room, seen
        self._length = 0

    def read(self, size: int = _PIECE, /) -> bytes:
        data = self._stream.read(size)
        self._length += len(data)
        if self._length > self._room:
            raise UserError(
                f"{self._path} holds more than the {format_bytes(max(0, self._room))} there is room for: make room, "
                "or leave it packed"
            )
        self._seen()
        return data
