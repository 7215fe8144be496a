"""Rows of JSON files, plain or compressed: a row a line, or the elements of one array; each within a row's limit."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from openchatkit.data.records.row import ROW_LIMIT, START, TOO_LONG, Mark, Row
from openchatkit.download.zstandard_stream import ZstandardStream

_ARRAY = ".json"  # which may also hold a row a line
_KINDS = (".jsonl", ".ndjson", _ARRAY)
_PACKINGS = ("", ".gz", ".zst", ".bz2", ".xz")
SUFFIXES = tuple(kind + packing for kind in _KINDS for packing in _PACKINGS)
ENDINGS = ".jsonl, .ndjson, .json (each also with .gz, .zst, .bz2 or .xz)"  # the same, to be read
BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError)
_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 11  # bytes of a line too long that are read at a time


class BrokenJSONError(ValueError):
    """An array that ends before its end, or is none."""


def suffix_of(name: str) -> str | None:
    """Return which of `SUFFIXES` a file's name ends with, in whatever case; None if with none."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), None)


class Lines:
    """The rows of an open file, blank lines aside; its name says what it holds, `size` is in bytes.

    Reading may raise any of `BROKEN_STREAM`, or BrokenJSONError.
    """

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        suffix = suffix_of(name)
        assert suffix is not None, name
        self._file, self.size = file, size
        self._kind = next(kind for kind in _KINDS if suffix in [kind + packing for packing in _PACKINGS])
        self._packing = suffix.removeprefix(self._kind)

    @property
    def position(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def read(self, start: Mark) -> Iterator[Row]:
        plain = not self._packing
        place = start.end if plain else 0
        if self._file.tell() != place:  # a member of an archive stands at its start and can go nowhere
            self._file.seek(place)
        stream = _decompressed(self._file, self._packing)
        if self._kind == _ARRAY and not place and _holds_array(stream):
            yield from _elements(stream, start)
        else:
            yield from _lines(stream, start, plain=plain)


def _lines(stream: BinaryIO, start: Mark, *, plain: bool) -> Iterator[Row]:
    number, end = start if plain else START
    while line := stream.readline(ROW_LIMIT + 1):
        number, end, error = number + 1, end + len(line), ""
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > ROW_LIMIT:
            end += _skip(stream, line)
            line, error = b"", TOO_LONG
        if number > start.number and (error or (line and not line.isspace())):
            yield Row(number, line, Mark(number, end if plain else 0), error)


def _holds_array(stream: BinaryIO) -> bool:
    """Whether what follows white space, however much of it is looked at, is an array's bracket; nothing is read."""
    return stream.peek(1 << 10).removeprefix(_BOM).lstrip()[:1] == b"["


def _elements(stream: BinaryIO, start: Mark) -> Iterator[Row]:
    """The elements of an array, as lines would have them."""
    import ijson

    if stream.peek(len(_BOM)).startswith(_BOM):
        stream.read(len(_BOM))
    try:
        for number, value in enumerate(ijson.items(stream, "item", use_float=True), 1):
            if number > start.number:
                data = json.dumps(value).encode()
                fits = len(data) <= ROW_LIMIT
                yield Row(number, data if fits else b"", Mark(number), "" if fits else TOO_LONG)
    except ijson.JSONError as error:
        raise BrokenJSONError(str(error).splitlines()[0][:100]) from error


def _skip(stream: BinaryIO, line: bytes) -> int:
    """Read on to the end of the line that begins so, and hold none of it; returns how many bytes that were."""
    size = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(_PIECE)
        size += len(line)
    return size


def _decompressed(file: BinaryIO, packing: str) -> BinaryIO:
    if packing == ".zst":
        return io.BufferedReader(ZstandardStream(file), 1 << 17)
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[packing](file) if packing else file
