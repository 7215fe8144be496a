"""Lines of a jsonl file, plain or compressed by gzip or zstd, none of them longer in memory than a row may be."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from openchatkit.data.records.row import ROW_LIMIT, START, TOO_LONG, Mark, Row
from openchatkit.download.zstandard_stream import ZstandardStream

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 11  # bytes of a line too long that are read at a time


class Lines:
    """The lines of an open file that are not blank; `suffix` says how it is compressed, `size` is in bytes.

    Reading may raise any of `BROKEN_STREAM`.
    """

    def __init__(self, file: BinaryIO, suffix: str, size: int) -> None:
        self._file, self._suffix, self.size = file, suffix, size

    @property
    def position(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def read(self, start: Mark) -> Iterator[Row]:
        plain = self._suffix == ".jsonl"
        place = start.end if plain else 0
        if self._file.tell() != place:  # a member of an archive stands at its start and can go nowhere
            self._file.seek(place)
        number, end = start if plain else START
        stream = _decompressed(self._file, self._suffix)
        while line := stream.readline(ROW_LIMIT + 1):
            number, end, error = number + 1, end + len(line), ""
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) > ROW_LIMIT:
                end += _skip(stream, line)
                line, error = b"", TOO_LONG
            if number > start.number and (error or (line and not line.isspace())):
                yield Row(number, line, Mark(number, end if plain else 0), error)


def _skip(stream: BinaryIO, line: bytes) -> int:
    """Read on to the end of the line that begins so, and hold none of it; returns how many bytes that were."""
    size = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(_PIECE)
        size += len(line)
    return size


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".zst":
        return io.BufferedReader(ZstandardStream(file), 1 << 17)
    return file
