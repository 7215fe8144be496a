"""Records: the raw rows of a file, one by one, each with its number, from the start or from where reading stopped.

A file is JSON, a row a line or one array, plain or compressed (`json_files`), parquet, or a folder written by
`save_to_disk` of `datasets` (`tables`). Rows of tables and arrays become JSON, so that one decoder (`document`) serves
all. Blank lines are no records. A truncated file never passes for a shorter one, and a line too long to be a document
never fills the memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from openchatkit import storage
from openchatkit.data.records import json_files, tables
from openchatkit.data.records.raw_row import START, Mark, RawRow
from openchatkit.errors import UserError

RECORD_SUFFIXES = (*json_files.SUFFIXES, tables.PARQUET)
ENDINGS = f"{json_files.ENDINGS}, {tables.PARQUET}"


def is_readable(name: str) -> bool:
    """Return whether a file's name, in any case, is one of a file of records."""
    return name.lower().endswith(RECORD_SUFFIXES)


def files(source: Path) -> list[Path]:
    """Return the files that hold a source's rows: itself, or those of a saved data set, sorted by name."""
    if not source.is_dir():
        return [source]
    # `datasets` keeps the results of other people's `map` in the same folder.
    return sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("cache-"))


# The name and stamp of each of a source's files.
Stamps = list[tuple[str, storage.Stamp]]


def stamps(source: Path) -> Stamps:
    """Return the name and the stamp of each of a source's files; a changed source has others."""
    return [(str(path.relative_to(source)), storage.stamp(path)) for path in files(source)]


def is_unchanged(source: Path, before: Stamps) -> bool:
    """Return whether a source still has these stamps."""
    try:
        return stamps(source) == before
    except OSError:
        return False


COLUMNS = ("text", "messages")  # a document is made of one of these


class Records:
    """A context manager that holds a file of records open. `size` and `position` are in bytes, for a progress bar.

    Only `columns` of a table are read. `source`, if given, is the file, opened already.
    """

    def __init__(
        self, path: Path, source: json_files.JsonFile | None = None, *, columns: Sequence[str] = COLUMNS
    ) -> None:
        self.path = Path(path)
        try:
            self._source = source or _open(self.path, columns)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        self.size = self._source.size

    @property
    def position(self) -> int:
        return self._source.position

    def rows(self, start: Mark = START) -> Iterator[RawRow]:
        """Yield the rows after `start`. UserError: no rows, or truncated or damaged data, with the last row read."""
        number = start.number
        try:
            for row in self._source.read(start):
                number = row.number
                yield row
        except json_files.BrokenJSONError as error:
            raise UserError(f"{self.path}: not JSON after row {number} ({error}): mend or fetch it again") from error
        except json_files.BROKEN_STREAM as error:
            raise UserError(
                f"{self.path}: the compressed data is cut short or damaged after line {number} ({error}): "
                "fetch or compress the file again"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read after row {number}: {error.strerror or error}") from error
        if not number:
            raise UserError(f'{self.path} holds no records: expected rows such as {{"text": "..."}}')

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()


def _open(path: Path, columns: Sequence[str]) -> json_files.JsonFile | tables.Parquet | tables.SavedDataset:
    if tables.is_saved_dataset(path):
        return tables.SavedDataset(path, columns)
    if path.name.lower().endswith(tables.PARQUET):
        return tables.Parquet(path, columns)
    if is_readable(path.name):
        return json_files.JsonFile(open(path, "rb"), path.name, path.stat().st_size)  # closed by `JsonFile.close`
    raise UserError(
        f"{path} is no file of records that can be read: expected a name in {ENDINGS}, "
        "or a folder written by save_to_disk"
    )
