"""The decompressed stream of a zstd file, in which a truncated file never passes for a shorter one."""

import io
from typing import BinaryIO

import zstandard

_PIECE = 1 << 11  # bytes decompressed at a time: few, since they may stand for 32,768 times as many


class ZstandardStream(io.RawIOBase):
    """Decompress every frame of a file. The library's own reader takes a truncated frame for the end of the data.

    Reading raises EOFError where a frame has no end, ZstdError where it is damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            data = b""
            if self._frame is not None and self._frame.eof:
                data, self._frame = self._frame.unused_data, None
            data = data or self._file.read(_PIECE)
            if not data:
                if self._frame is not None:
                    raise EOFError("a zstd frame without its end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
