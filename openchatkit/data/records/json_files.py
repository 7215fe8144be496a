"""Rows of JSON files, plain or compressed: a row a line, or the elements of one array; each within a row's limit."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator

import zstandard

from openchatkit.data.records.raw_row import ROW_LIMIT, START, TOO_LONG, Mark, RawRow
from openchatkit.download.zstandard_stream import ZstandardStream

_ARRAY = ".json"  # which may also hold a row a line
_KINDS = (".jsonl", ".ndjson", _ARRAY)
_PACKINGS = ("", ".gz", ".zst", ".bz2", ".xz")
SUFFIXES = tuple(kind + packing for kind in _KINDS for packing in _PACKINGS)
ENDINGS = ".jsonl, .ndjson, .json (each also with .gz, .zst, .bz2 or .xz)"  # the same, to be read
BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError)
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()
Stream = io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile
_CHUNK = 1 << 16  # bytes of an array that are read at a time
_PIECE = 1 << 11  # bytes of a line too long that are read at a time


class BrokenJSONError(ValueError):
    """Text that is no JSON array, or only the beginning of one."""


def form_of(name: str) -> tuple[str, str] | None:
    """Return (kind, packing) by a file's name, in any case; None for another kind of file."""
    forms = ((kind, packing) for kind in _KINDS for packing in _PACKINGS)
    return next((form for form in forms if name.lower().endswith("".join(form))), None)


class JsonFile:
    """The rows of an open file, without blank lines. Its name tells the kind and the packing; `size` is in bytes.

    Reading may raise any of `BROKEN_STREAM`, or BrokenJSONError.
    """

    def __init__(self, file: io.BufferedReader, name: str, size: int) -> None:
        form = form_of(name)
        assert form is not None, name
        self._kind, self._packing = form
        self._file, self.size = file, size

    @property
    def position(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def read(self, start: Mark) -> Iterator[RawRow]:
        plain = not self._packing
        place = start.end if plain else 0
        if self._file.tell() != place:  # a member of an archive stands at its start and can go nowhere
            self._file.seek(place)
        stream = _decompress(self._file, self._packing)
        if self._kind == _ARRAY and not place and _holds_array(stream):
            yield from _elements(stream, start)
        else:
            yield from _lines(stream, start, plain=plain)


def _lines(stream: Stream, start: Mark, *, plain: bool) -> Iterator[RawRow]:
    number, end = start if plain else START
    while line := stream.readline(ROW_LIMIT + 1):
        number, end, error = number + 1, end + len(line), ""
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > ROW_LIMIT:
            end += _skip(stream, line)
            line, error = b"", TOO_LONG
        if number > start.number and (error or (line and not line.isspace())):
            yield RawRow(number, line, Mark(number, end if plain else 0), error)


def _holds_array(stream: Stream) -> bool:
    """Return whether an array's bracket follows the white space at hand; nothing is consumed."""
    return stream.peek(1 << 10).removeprefix(_BOM).lstrip()[:1] == b"["


def _elements(stream: Stream, start: Mark) -> Iterator[RawRow]:
    """Yield the elements of an array as they are written, as if each were a line."""
    text, number = _ArrayText(stream), 0
    if text.take() != "[":
        raise BrokenJSONError("expected an array")
    following = text.take() if text.peek() == "]" else ","
    while following == ",":
        data, number = text.take_element().encode(), number + 1
        if number > start.number:
            fits = len(data) <= ROW_LIMIT
            yield RawRow(number, data if fits else b"", Mark(number), "" if fits else TOO_LONG)
        following = text.take()
    if following != "]" or text.peek():
        raise BrokenJSONError(f"expected a comma or the array's end, found {following or 'the end of the file'!r}")


class _ArrayText:
    """The text of an array, of which only an element and a piece after it are in memory."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space, "the pattern matches an empty string, too"
            self._at = space.end()
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        """Return what `peek` does, and consume it."""
        character = self.peek()
        self._at += len(character)
        return character

    def take_element(self) -> str:
        """Consume and return the next value, as it is written."""
        self.peek()
        while True:
            try:
                end = _JSON.raw_decode(self._text, self._at)[1]
                if end < len(self._text) or not self._grow():  # a number may go on
                    break
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at > 2 * ROW_LIMIT or not self._grow():
                    raise BrokenJSONError(str(error).partition(": line")[0]) from error
        element, self._at = self._text[self._at : end], end
        return element

    def _grow(self) -> bool:
        """Read on until twice as much is held; return False at the end of the file."""
        data = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise BrokenJSONError("it is not UTF-8") from error
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(data)


def _skip(stream: Stream, line: bytes) -> int:
    """Read to the end of the line that begins with `line`, keeping nothing; return the number of bytes read."""
    size = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(_PIECE)
        size += len(line)
    return size


def _decompress(file: io.BufferedReader, packing: str) -> Stream:
    if packing == ".zst":
        return io.BufferedReader(ZstandardStream(file), 1 << 17)
    if packing == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if packing == ".bz2":
        return bz2.BZ2File(file)
    return lzma.LZMAFile(file) if packing == ".xz" else file
