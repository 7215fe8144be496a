"""The bytes and lines of text files, plain or compressed by gzip: a digest in one pass, and lines of bounded length.

A file is checked once before it is read, which gives its digest and shows whether it is text; so reading does not fail
half way unless the file changes in between. Text that is not UTF-8 is read in the encoding that `encodings` guesses,
and noted.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from openchatkit import storage
from openchatkit.retrieval.reading import encodings
from openchatkit.retrieval.reading.document import Unreadable
from openchatkit.retrieval.reading.encodings import Encoding

_GZIP = ".gz"
LINE_LIMIT = 1 << 14  # characters; a longer line comes in pieces
ROW_LIMIT = 1 << 24
_PIECE = 1 << 20
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


def digest(path: Path, *, text: bool) -> str:
    """Return the SHA-256 of a file on disk. Unreadable: it cannot be opened, or is not text although `text`."""
    try:
        if text:
            _detect_encoding(path)
        return storage.sha256(path)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error


def lines(path: Path, notes: list[str], *, whole_rows: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without its end) of each line. A line that is too long comes in pieces of one number.

    `notes` collects guesses about the encoding. Unreadable: a line is too long, with `whole_rows`.
    """
    limit = ROW_LIMIT if whole_rows else LINE_LIMIT
    number, held = 1, ""
    found = _detect_encoding(path)
    notes += [found.note] if found.note else []
    with _open(path) as file, _reject_damaged(), _text(file, found) as text:
        while (line := held + text.readline(limit - len(held))) != held or held:
            ended = line.endswith("\n")
            if whole_rows and not ended and len(line) == limit:
                raise Unreadable(f"line {number} is longer than {limit:,} characters")
            # A piece ends between two words if possible.
            end = (line.rfind(" ") + 1 or limit) if len(line) == limit and not ended else len(line)
            held = line[end:]
            yield number, line[:end].removesuffix("\n")
            number += ended


def whole(path: Path, limit: int) -> bytes:
    """Return all bytes of a file, decompressed. Unreadable: they are more than `limit`."""
    with _open(path) as file, _reject_damaged():
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Unreadable(f"too large: more than {limit:,} bytes (see --max-bytes)")
    return data


def _detect_encoding(path: Path) -> Encoding:
    """Return the encoding of a text file: by its byte order mark, UTF-8, or guessed. Unreadable: it is not text."""
    with _open(path) as file, _reject_damaged():
        name = encodings.detect_mark(file.read(3)) or "utf-8"
        file.seek(0)
        try:
            with _text(file, Encoding(name)) as text:
                while piece := text.read(_PIECE):
                    if "\0" in piece:
                        raise Unreadable("holds zero bytes, so it is not text")
            return Encoding(name)
        except UnicodeDecodeError:
            file.seek(0)
            return encodings.guess(_sample_non_ascii(file) if name.startswith("utf-8") else file.read(_PIECE), name)


def stem(path: Path) -> str:
    """Return the name of a file without its endings, that of gzip included."""
    return Path(plain_name(path)).stem


def plain_name(path: Path) -> str:
    """Return the name of a file without the ending of gzip, which may be in capitals like all endings."""
    return path.name[: -len(_GZIP)] if path.name.lower().endswith(_GZIP) else path.name


def _open(path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path)) if plain_name(path) != path.name else open(path, "rb")
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _text(file: IO[bytes], encoding: Encoding) -> Iterator[io.TextIOWrapper]:
    """Read the text of a file, which stays open."""
    text = io.TextIOWrapper(file, encoding=encoding.name, errors=encoding.errors, newline=None)
    try:
        yield text
    finally:
        text.detach()


@contextlib.contextmanager
def _reject_damaged() -> Iterator[None]:
    """Raise Unreadable for compressed data that is damaged."""
    try:
        yield
    except _BROKEN as error:
        raise Unreadable(f"the compressed data is cut short or damaged ({error})") from error


def _sample_non_ascii(file: IO[bytes]) -> bytes:
    """Return lines, or pieces of them, with characters that are not ASCII: at most a sample."""
    found = bytearray()
    while len(found) < _PIECE and (line := file.readline(LINE_LIMIT)):
        found += b"" if line.isascii() else line
    return bytes(found)
