"""Files of plain text, each of them one document, as `tools/preprocess_data.py` takes them."""

import json
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.errors import UserError
from openchatkit.storage import format_bytes

TEXT = ".txt"
_Opened = TypeVar("_Opened", bound="InputFile")
_LIMIT = 10**9  # bytes; a text is held in memory with its tokens


def is_text(name: str) -> bool:
    """Return whether a file's name, in any case, is one of a text."""
    return name.lower().endswith(TEXT)


def read_text(stream: IO[bytes]) -> RawRow:
    """Return the row of a whole text, under the key `text`; one that is no UTF-8, or too long, is a bad row."""
    data, mark = stream.read(_LIMIT + 1), Mark(1)
    if len(data) > _LIMIT:
        return RawRow(1, b"", mark, f"the text is longer than {format_bytes(_LIMIT)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RawRow(1, b"", mark, f"byte {error.start + 1} of the text is not UTF-8")
    return RawRow(1, json.dumps({"text": text}, ensure_ascii=False).encode(), mark)


class InputFile:
    """A context manager that holds a file open; `position` is in bytes, for a progress bar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed by `__exit__`)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error

    @property
    def position(self) -> int:
        return self._file.tell()

    def __enter__(self: _Opened) -> _Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class TextFile(InputFile):
    """A file of text."""

    def rows(self) -> list[RawRow]:
        """Return the one row."""
        return [read_text(self._file)]
