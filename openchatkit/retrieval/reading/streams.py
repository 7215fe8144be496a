"""The bytes and lines of text files, plain or compressed by gzip: a digest in one pass, and lines of bounded length.

A file is looked through once before it is read, which gives its digest and says whether it is text at all; so reading
meets no surprise half way, unless the file is changed in between. What is not UTF-8 is read in the encoding that
`encodings` takes it for, and noted.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openchatkit import storage
from openchatkit.retrieval.reading import encodings
from openchatkit.retrieval.reading.document import Unreadable
from openchatkit.retrieval.reading.encodings import Encoding

GZIP = ".gz"
LINE_LIMIT = 1 << 14  # characters; a longer line comes in pieces
ROW_LIMIT = 1 << 24
_PIECE = 1 << 20
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


def digest(path: Path, *, text: bool) -> str:
    """SHA-256 of a file as it lies on disk. Unreadable: it cannot be opened, or is not the `text` that it should be."""
    try:
        if text:
            detect_encoding(path)
        return storage.sha256(path)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error


def lines(path: Path, notes: list[str], *, whole_rows: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line. One that is too long comes in pieces of the same number.

    `notes` takes what had to be supposed of the file's encoding. Unreadable: with `whole_rows`, there is such a line.
    """
    limit = ROW_LIMIT if whole_rows else LINE_LIMIT
    number, held = 1, ""
    found = detect_encoding(path)
    notes += [found.note] if found.note else []
    with _open(path) as file, _reject_damaged(), _text(file, found) as text:
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
    with _open(path) as file, _reject_damaged():
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Unreadable(f"too large: more than {limit:,} bytes (see --max-bytes)")
    return data


def detect_encoding(path: Path) -> Encoding:
    """The encoding of a text file: that of its first bytes or UTF-8, where all of it is. Unreadable: it is no text."""
    with _open(path) as file, _reject_damaged():
        name = encodings.encoding_of_mark(file.read(3)) or "utf-8"
        file.seek(0)
        try:
            with _text(file, Encoding(name)) as text:
                while piece := text.read(_PIECE):
                    if "\0" in piece:
                        raise Unreadable("holds zero bytes, so it is no text")
            return Encoding(name)
        except UnicodeDecodeError:
            file.seek(0)
            return encodings.guess(_sample_non_ascii(file) if name.startswith("utf-8") else file.read(_PIECE), name)


def stem(path: Path) -> str:
    """A file's name without its endings, the one for compression included."""
    return Path(plain_name(path)).stem


def plain_name(path: Path) -> str:
    """A file's name without the ending for compression, which may be in capitals as all endings."""
    return path.name[: -len(GZIP)] if path.name.lower().endswith(GZIP) else path.name


def _open(path: Path) -> BinaryIO:
    try:
        return gzip.open(path) if plain_name(path) != path.name else open(path, "rb")
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _text(file: BinaryIO, encoding: Encoding) -> Iterator[io.TextIOWrapper]:
    """The text in a file that stays open."""
    text = io.TextIOWrapper(file, encoding=encoding.name, errors=encoding.errors, newline=None)
    try:
        yield text
    finally:
        text.detach()


@contextlib.contextmanager
def _reject_damaged() -> Iterator[None]:
    """Unreadable where compressed data is not whole."""
    try:
        yield
    except _BROKEN as error:
        raise Unreadable(f"the compressed data is cut short or damaged ({error})") from error


def _sample_non_ascii(file: BinaryIO) -> bytes:
    """Lines, or pieces of them, that are not ASCII alone: some of all there are."""
    found = bytearray()
    while len(found) < _PIECE and (line := file.readline(LINE_LIMIT)):
        found += b"" if line.isascii() else line
    return bytes(found)
