"""The table of passages: an Arrow IPC file of blocks of 4,096 rows, read by memory map a block at a time.

A row's number is its id. Rows of one document stand together and in order, so a passage's neighbours are the rows
beside it that have its document's number.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from openchatkit.errors import UserError
from openchatkit.retrieval.passage import Passage

BLOCK = 4096  # rows; opening a file costs a few bytes a block, reading a row some tens of microseconds the first time
_OPEN_BLOCKS = 256
_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("title", pa.string()),
        ("source", pa.string()),
        ("place", pa.string()),
        ("digest", pa.binary()),
        ("document", pa.int64()),
        ("position", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Row:
    """A passage as it is stored.

    `digest` names what its vector was made from, so that it need not be made again; `document` is the number of its
    document, any number that its neighbours in the table do not have, and `position` its place in that, ascending.
    """

    text: str
    title: str = ""
    source: str = ""
    place: str = ""
    digest: bytes = b""
    document: int = 0
    position: int = 0


def write(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as they come, a block in memory at a time; how many."""
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for block in _blocks(rows):
            columns = [[getattr(row, name) for row in block] for name in _SCHEMA.names]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            count += len(block)
    return count


class Table:
    """Rows by number. Opening reads the footer alone; UserError where the file is no such table of so many rows."""

    def __init__(self, path: Path, rows: int) -> None:
        self._path = path
        self._rows = rows
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._file = pa.memory_map(str(path), "r")
        try:
            self._reader = pa.ipc.open_file(self._file)
            if self._reader.schema != _SCHEMA:
                raise ValueError(f"its columns are {', '.join(self._reader.schema.names)}")
            blocks = self._reader.num_record_batches
            last = self._reader.get_batch(blocks - 1).num_rows if blocks else 0
            if (found := max(0, blocks - 1) * BLOCK + last) != rows:
                raise ValueError(f"it holds {found:,} rows, the manifest says {rows:,}")
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
            self._file.close()
            raise UserError(f"{path} is no table of passages: {error}; build the index again") from error

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int) -> Row:
        """The row of a number."""
        assert 0 <= number < self._rows, (number, self._rows)
        block, at = self._block(number // BLOCK), number % BLOCK
        return Row(*(block.column(name)[at].as_py() for name in _SCHEMA.names))

    def passage(self, number: int, score: float = 0.0) -> Passage:
        """The passage of a number."""
        row = self.row(number)
        return Passage(row.text, row.title, row.source, row.place, score, number)

    def rows(self, first: int = 0, end: int | None = None) -> Iterator[Row]:
        """The rows from `first` until before `end`, in order, a block in memory at a time."""
        end = self._rows if end is None else end
        while first < end:
            block, at = self._block(first // BLOCK), first % BLOCK
            size = min(end - first, len(block) - at)
            columns = (block.column(name).slice(at, size).to_pylist() for name in _SCHEMA.names)
            yield from (Row(*values) for values in zip(*columns, strict=True))
            first += size

    def texts(self) -> Iterator[str]:
        """What the words of every row are taken from, in order: its title and its text."""
        for number in range((self._rows + BLOCK - 1) // BLOCK):
            block = self._block(number)
            titles, texts = block.column("title").to_pylist(), block.column("text").to_pylist()
            yield from (f"{title}\n{text}" for title, text in zip(titles, texts, strict=True))

    def digests(self) -> Iterator[bytes]:
        """The digest of every row, in order."""
        for number in range((self._rows + BLOCK - 1) // BLOCK):
            yield from self._block(number).column("digest").to_pylist()

    def neighbours(self, number: int, width: int) -> range:
        """The rows within `width` of one that are of the same document, itself among them."""
        document = self._document(number)
        first = end = number
        while first > max(0, number - width) and self._document(first - 1) == document:
            first -= 1
        while end < min(self._rows - 1, number + width) and self._document(end + 1) == document:
            end += 1
        return range(first, end + 1)

    def close(self) -> None:
        """Give the map back."""
        self._open.clear()
        self._file.close()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _document(self, number: int) -> int:
        return self._block(number // BLOCK).column("document")[number % BLOCK].as_py()

    def _block(self, number: int) -> pa.RecordBatch:
        if (block := self._open.get(number)) is not None:
            return block
        try:
            block = self._reader.get_batch(number)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._path} is damaged in block {number}: {error}; build the index again") from error
        # Several threads may be here: each leaves the cache whole, at worst without what it has just read.
        self._open[number] = block
        while len(self._open) > _OPEN_BLOCKS:
            self._open.popitem(last=False)
        return block


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    block = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block
