"""The table of passages: an Arrow IPC file of equal blocks, read by memory map (`blocks`).

The number of a row is its id. Rows of one document are adjacent and in order, so the neighbours of a passage are the
adjacent rows with the number of its document.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from openchatkit.retrieval import blocks
from openchatkit.retrieval.passage import Passage

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
class PassageRow:
    """A passage as it is stored.

    `digest` is of the text that was embedded, so that its vector can be reused; `document` is the number of its
    document, different from those of adjacent documents, and `position` its ascending place in that.
    """

    text: str
    title: str = ""
    source: str = ""
    place: str = ""
    digest: bytes = b""
    document: int = 0
    position: int = 0


def write(path: Path, rows: Iterable[PassageRow]) -> int:
    """Write rows, one block in memory at a time; return their number."""
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for block in _blocks(rows):
            columns = [[getattr(row, name) for row in block] for name in _SCHEMA.names]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            count += len(block)
    return count


class Table:
    """Rows by number. Opening reads only the footer; UserError: the file is not such a table of `rows` rows."""

    def __init__(self, path: Path, rows: int) -> None:
        self._blocks = blocks.Blocks(path, rows, _SCHEMA, what="table of passages", advice="build the index again")

    def __len__(self) -> int:
        return self._blocks.rows

    def row(self, number: int) -> PassageRow:
        """Return the row of a number."""
        assert 0 <= number < len(self), (number, len(self))
        block, at = self._blocks.block(number // blocks.BLOCK), number % blocks.BLOCK
        return PassageRow(*(block.column(name)[at].as_py() for name in _SCHEMA.names))

    def passage(self, number: int, score: float = 0.0) -> Passage:
        """Return the passage of a number."""
        row = self.row(number)
        return Passage(row.text, row.title, row.source, row.place, score, number)

    def rows(self, first: int = 0, end: int | None = None) -> Iterator[PassageRow]:
        """Yield the rows from `first` up to `end`, exclusive, one block in memory at a time."""
        end = len(self) if end is None else end
        while first < end:
            block, at = self._blocks.block(first // blocks.BLOCK), first % blocks.BLOCK
            size = min(end - first, len(block) - at)
            columns = (block.column(name).slice(at, size).to_pylist() for name in _SCHEMA.names)
            yield from (PassageRow(*values) for values in zip(*columns, strict=True))
            first += size

    def texts(self) -> Iterator[str]:
        """Yield title and text of every row in order, from which its words are taken."""
        for number in range(len(self._blocks)):
            block = self._blocks.block(number)
            titles, texts = block.column("title").to_pylist(), block.column("text").to_pylist()
            yield from (f"{title}\n{text}" for title, text in zip(titles, texts, strict=True))

    def digests(self) -> Iterator[bytes]:
        """Yield the digest of every row in order."""
        for number in range(len(self._blocks)):
            yield from self._blocks.block(number).column("digest").to_pylist()

    def neighbours(self, number: int, width: int) -> range:
        """Return the rows of the same document around `number`, itself included, at most `width` on each side."""
        return self._blocks.equal_neighbours("document", number, width)

    def close(self) -> None:
        """Close the map."""
        self._blocks.close()

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def _blocks(rows: Iterable[PassageRow]) -> Iterator[list[PassageRow]]:
    block = []
    for row in rows:
        block.append(row)
        if len(block) == blocks.BLOCK:
            yield block
            block = []
    if block:
        yield block
