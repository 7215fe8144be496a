"""A raw row: one record of a file as it was read, the same for every kind of file, and the position after it."""

from typing import NamedTuple

ROW_LIMIT = 16 << 20  # bytes: 100 times the longest chat known
TOO_LONG = f"longer than {ROW_LIMIT >> 20} MiB"


class Mark(NamedTuple):
    """A position between rows: the number of the row before it and, in a plain file, its end in bytes (else 0)."""

    number: int = 0
    end: int = 0


START = Mark()


class RawRow(NamedTuple):
    """A record: the number of its line or of its row in a table, from 1; its JSON; and the position after it.

    `error` is the reason why it could not be read; `data` is empty then.
    """

    number: int
    data: bytes
    mark: Mark
    error: str = ""
