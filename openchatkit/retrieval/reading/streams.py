"""The bytes and lines of text files, plain or compressed by gzip: a digest in one pass, and lines of bounded length.

A file is looked through once before it is read, which gives its digest and says whether it is text at all; so reading
meets no surprise half way, unless the file is changed in between.
"""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openchatkit import paths
from openchatkit.retrieval.reading.document import Unreadable

GZIP = ".gz"
LINE_LIMIT = 1 << 14  # characters; a longer line comes in pieces
ROW_LIMIT = 1 << 24
_PIECE = 1 << 20
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


def digest(path: Path, *, text: bool) -> str:
    """SHA-256 of a file as it lies on disk. Unreadable: it cannot be opened, or is not the `text` that it should be."""
    try:
        if text:
            _check(path)
        return paths.sha256(path)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error


def lines(path: Path, *, whole_rows: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line. One that is too long comes in pieces of the same number.

    Unreadable: with `whole_rows`, there is such a line.
    """
    limit = ROW_LIMIT if whole_rows else LINE_LIMIT
    number, held = 1, ""
    with _opened(path) as file, _reading(file) as text:
        while (line := held + text.readline(limit - len(held))) != held or held:
            ended = line.endswith("\n")
            if whole_rows and not ended and len(line) == limit:
                raise Unreadable(f"line {number} is longer than {limit:,} characters")
            # A piece ends between two words, if there are two.
            end = (line.rfind(" ") + 1 or limit) if len(line) == limit and not ended else len(line)
            held = line[end:]
            yield number, line[:end].removesuffix("\n")
            number += ended


def whole(path: Path, limit: int) -> bytes:
    """All bytes of a file, unpacked. Unreadable: they are more than `limit`."""
    with _opened(path) as file:
        try:
            data = file.read(limit + 1)
        except _BROKEN as error:
            raise Unreadable(f"the compressed data is cut short or damaged ({error})") from error
    if len(data) > limit:
        raise Unreadable(f"too large: more than {limit:,} bytes (see --max-bytes)")
    return data


def marked(data: bytes) -> str | None:
    """The encoding that a text's first bytes say it has, if they do."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def undecodable(encoding: str) -> str:
    """What to tell of bytes that are not in the encoding that they should be in."""
    return f"holds bytes that are no {encoding.removesuffix('-sig').upper()}: save it as UTF-8"


def stem(path: Path) -> str:
    """A file's name without its endings, the one for compression included."""
    return Path(plain_name(path)).stem


def plain_name(path: Path) -> str:
    """A file's name without the ending for compression, which may be in capitals as all endings."""
    return path.name[: -len(GZIP)] if path.name.lower().endswith(GZIP) else path.name


def _opened(path: Path) -> BinaryIO:
    try:
        return gzip.open(path) if plain_name(path) != path.name else open(path, "rb")
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _reading(file: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """The text in a file, in the encoding that it begins with or UTF-8; what is wrong with it is Unreadable."""
    encoding = "utf-8"
    try:
        encoding = marked(file.read(3)) or encoding
        file.seek(0)
        yield io.TextIOWrapper(file, encoding=encoding, newline=None)
    except UnicodeDecodeError as error:
        raise Unreadable(undecodable(encoding)) from error
    except _BROKEN as error:
        raise Unreadable(f"the compressed data is cut short or damaged ({error})") from error


def _check(path: Path) -> None:
    with _opened(path) as file, _reading(file) as text:
        while piece := text.read(_PIECE):
            if "\0" in piece:
                raise Unreadable("holds zero bytes, so it is no text")
