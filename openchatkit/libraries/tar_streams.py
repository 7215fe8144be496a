"""Tars that are read as streams, with the checks that tarfile does not make; a recent feature of it saves memory."""

import inspect
import tarfile
from collections.abc import Iterator
from typing import IO, Any, Protocol

from openchatkit.storage import format_bytes

_BLOCK = 512  # bytes; a tar ends with two blocks of zeros
_PIECE = 1 << 20
_LONGEST_HEADER = 1 << 22  # bytes, for one file in a tar; a thousand times what names need


class Readable(Protocol):
    """A stream of bytes that is only ever read on."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, and none at the end."""


def read_members(stream: Readable) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield each member, and its contents where it is a file, to be read before the next member.

    tarfile alone keeps all members in memory, reads headers however long they are, and takes a tar that was cut between
    two members for a shorter one. Raises EOFError or tarfile.TarError where it is damaged or cut.
    """
    checked = _CheckedStream(stream)
    # Without this feature (Python before 3.13) members are kept where they can be dropped from here.
    recent: dict[str, Any] = {"stream": True} if "stream" in inspect.signature(tarfile.TarFile).parameters else {}
    with tarfile.open(fileobj=checked, mode="r|", **recent) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            getattr(archive, "members", []).clear()
            checked.stop = None
            yield member, archive.extractfile(member) if member.isreg() else None
            checked.stop = archive.offset + _LONGEST_HEADER
    checked.stop = None
    # The end of compressed data holds its checksum.
    while checked.read(_PIECE):
        pass
    if checked.tail != bytes(_BLOCK):
        raise EOFError("a tar without its end")


class _CheckedStream:
    """A stream that keeps its last block, and fails where more than the first `stop` bytes are read of it."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._length = 0
        self.tail = b""
        self.stop: int | None = _LONGEST_HEADER

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._length += len(data)
        self.tail = (self.tail + data[-_BLOCK:])[-_BLOCK:]
        if self.stop is not None and self._length > self.stop:
            raise tarfile.ReadError(f"a header of more than {format_bytes(_LONGEST_HEADER)}")
        return data
