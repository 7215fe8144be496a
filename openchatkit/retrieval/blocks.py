"""Rows in an Arrow IPC file of blocks of one size, read by memory map a block at a time.

Finds rows and limits the number of open blocks; `table` and `wikipedia.table` define the columns.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa

from openchatkit.errors import UserError

BLOCK = 4096  # rows; opening a file costs a few bytes a block, reading a row tens of microseconds the first time
_OPEN_BLOCKS = 256


class Blocks:
    """A file of blocks of BLOCK rows, the last of which may be shorter. Opening reads only the footer.

    UserError: the file does not hold `rows` rows of `schema`, or is damaged. The message says that it is not a `what`,
    and ends in `advice` on what to do next.
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
            raise UserError(f"{path} is not a {what}: {error}{self._advice}") from error

    def __len__(self) -> int:
        """The number of blocks."""
        return (self.rows + BLOCK - 1) // BLOCK

    def value(self, column: str, row: int) -> Any:
        """Return the value of a column in a row."""
        assert 0 <= row < self.rows, (row, self.rows)
        return self.block(row // BLOCK).column(column)[row % BLOCK].as_py()

    def equal_neighbours(self, column: str, row: int, width: int) -> range:
        """Return the unbroken run of rows around `row` with its value of a column, at most `width` on each side."""
        value = self.value(column, row)
        first = end = row
        while first > max(0, row - width) and self.value(column, first - 1) == value:
            first -= 1
        while end < min(self.rows - 1, row + width) and self.value(column, end + 1) == value:
            end += 1
        return range(first, end + 1)

    def block(self, number: int) -> pa.RecordBatch:
        """Return the block of a number; UserError: it is damaged."""
        if (block := self._open.get(number)) is not None:
            return block
        try:
            block = self._reader.get_batch(number)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._path} is damaged in block {number}: {error}{self._advice}") from error
        # Several threads may be here: each leaves the cache intact, at worst without the block just read.
        self._open[number] = block
        while len(self._open) > _OPEN_BLOCKS:
            self._open.popitem(last=False)
        return block

    def close(self) -> None:
        """Close the map."""
        self._open.clear()
        self._file.close()
