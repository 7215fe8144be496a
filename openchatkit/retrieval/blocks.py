"""Rows in an Arrow IPC file of blocks of one size, read by memory map a block at a time.

Owns finding a row and keeping few blocks open; what the columns mean is `table`'s and `wikipedia.table`'s.
"""

from collections import OrderedDict
from pathlib import Path

import pyarrow as pa

from openchatkit.errors import UserError

BLOCK = 4096  # rows; opening a file costs a few bytes a block, reading a row some tens of microseconds the first time
_OPEN_BLOCKS = 256


class Blocks:
    """A file of blocks of BLOCK rows, the last of which may be shorter. Opening reads the footer alone.

    UserError where the file does not hold `rows` rows of `schema`, or is damaged: it is no `what`, and `advice` says
    what to do next.
    """

    def __init__(self, path: Path, rows: int, schema: pa.Schema, *, what: str, advice: str = "") -> None:
        self.rows = rows
        self._path = path
        self._advice = f"; {advice}" if advice else ""
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._file = pa.memory_map(str(path), "r")
        try:
            self._reader = pa.ipc.open_file(self._file)
            if self._reader.schema != schema:
                raise ValueError(f"its columns are {', '.join(self._reader.schema.names)}")
            blocks = self._reader.num_record_batches
            last = self._reader.get_batch(blocks - 1).num_rows if blocks else 0
            if (found := max(0, blocks - 1) * BLOCK + last) != rows:
                raise ValueError(f"it holds {found:,} rows, the manifest says {rows:,}")
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
            self._file.close()
            raise UserError(f"{path} is no {what}: {error}{self._advice}") from error

    def __len__(self) -> int:
        """The number of blocks."""
        return (self.rows + BLOCK - 1) // BLOCK

    def value(self, column: str, row: int) -> object:
        """What a column holds in a row."""
        assert 0 <= row < self.rows, (row, self.rows)
        return self.block(row // BLOCK).column(column)[row % BLOCK].as_py()

    def alike(self, column: str, row: int, width: int) -> range:
        """The rows within `width` of one that hold the same in a column without a break, itself among them."""
        value = self.value(column, row)
        first = end = row
        while first > max(0, row - width) and self.value(column, first - 1) == value:
            first -= 1
        while end < min(self.rows - 1, row + width) and self.value(column, end + 1) == value:
            end += 1
        return range(first, end + 1)

    def block(self, number: int) -> pa.RecordBatch:
        """The block of a number; UserError when it is damaged."""
        if (block := self._open.get(number)) is not None:
            return block
        try:
            block = self._reader.get_batch(number)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._path} is damaged in block {number}: {error}{self._advice}") from error
        # Several threads may be here: each leaves the cache whole, at worst without what it has just read.
        self._open[number] = block
        while len(self._open) > _OPEN_BLOCKS:
            self._open.popitem(last=False)
        return block

    def close(self) -> None:
        """Give the map back."""
        self._open.clear()
        self._file.close()
