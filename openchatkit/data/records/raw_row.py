"""A row: one record of a file as it is read, whatever the kind of file, and the place behind it."""

from typing import NamedTuple

ROW_LIMIT = 16 << 20  # bytes: 100 times the longest chat there is
TOO_LONG = f"longer than {ROW_LIMIT >> 20} MiB"


class Mark(NamedTuple):
    """A place between rows: the number of the last one before it and, in a plain file, its end in bytes (else 0)."""

    number: int = 0
    end: int = 0


START = Mark()


class RawRow(NamedTuple):
    """A record: its line, or its row in a table, counted from 1; its JSON; and the place behind it.

    Where `error` says why it is none, `data` is empty.
    """

    number: int
    data: bytes
    mark: Mark
    error: str = ""
