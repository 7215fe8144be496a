"""Records: the documents of a jsonl file, plain or compressed, one by one, each with its line number.

A line is a JSON object with a string `text`; other keys are ignored and empty lines are no records. Whatever else is
found there stops the reading with the file and the line: nothing is skipped, and a compressed stream that was cut short
never passes for a shorter one. Tokenising is `data.tokenise`.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import zstandard

from openchatkit.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 14  # bytes decompressed at a time: small, since text may shrink a hundredfold
_BROKEN_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


class Records:
    """Iterates `(line number, text)`, lines counted from 1. A context manager: it holds the file open.

    `position` is how many bytes of the file, compressed or not, have been taken in, for a progress bar.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is no file of records that can be read: expected a name in {', '.join(SUFFIXES)}")
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (closed by `__exit__`)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    @property
    def position(self) -> int:
        return self._file.tell()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        self._file.seek(0)
        number, records = 0, 0
        try:
            for line in _decompressed(self._file, self.path.suffix):
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                if not line.strip():
                    continue
                records += 1
                yield number, _text(line, f"{self.path}:{number}")
        except _BROKEN_STREAM as error:
            raise UserError(
                f"{self.path}: the compressed data is cut short or damaged behind line {number} ({error}): "
                "fetch or compress the file again"
            ) from error
        if not records:
            raise UserError(f'{self.path} holds no records: expected lines such as {{"text": "..."}}')

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _text(line: bytes, place: str) -> str:
    """The `text` of one line; UserError, beginning with its place, if there is none."""
    try:
        record = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg} at character {error.colno}): mend or remove it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no record: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f'{place}: expected an object such as {{"text": "..."}}, found {_kind(record)}')
    if "text" not in record:
        found = ", ".join(repr(key) for key in list(record)[:5]) or "none"
        raise UserError(f"{place}: the record has no 'text' (its keys: {found})")
    text = record["text"]
    if not isinstance(text, str):
        raise UserError(f"{place}: expected 'text' to be a string, found {_kind(text)}")
    if not text.strip():
        raise UserError(f"{place}: 'text' is empty: remove the line")
    if "\0" in text:
        raise UserError(f"{place}: 'text' holds a NUL character, a mark of damaged data: mend or remove the line")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: 'text' holds half a surrogate pair: mend or remove the line") from error
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardStream(file), 1 << 17)
    return file


class _ZstandardStream(io.RawIOBase):
    """Decompresses every frame of a file. The library's own reader takes a cut frame for the end of the data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
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
