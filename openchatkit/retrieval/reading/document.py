"""What readers hand on: documents as runs of blocks that know where they stand, and what stops a file from being read.

A document is read once, from its start; nothing of it need be in memory at one time. Which block becomes which passage
is `chunks`' to say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Everything but tab and newline that a terminal would obey or that no text holds.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), 0xFEFF], " ")
_CONTROLS[0xAD] = ""  # a hyphen that is shown at a line's end alone
_LONGEST = 1 << 14  # characters of a block: a paragraph beyond that is cut, at a line or else anywhere


class Unreadable(Exception):
    """Why a file cannot be read: one clause, for the list of what was skipped."""


@dataclass(frozen=True)
class Block:
    """A heading, a paragraph or a piece of code; `first` and `last` count lines, pages or rows from 1.

    `level` is 1 and above for headings, 0 for all else. `head` is the header of the table that a block is of: each of
    its passages repeats it.
    """

    text: str
    first: int
    last: int
    level: int = 0
    code: bool = False
    head: str = ""

    def lines(self, start: int, end: int) -> tuple[int, int]:
        """Where the characters from `start` to `end` stand: on which lines, if those are known one by one."""
        if self.text.count("\n") != self.last - self.first:
            return self.first, self.last
        first = self.first + self.text.count("\n", 0, start)
        return first, first + self.text.count("\n", start, end)


@dataclass
class Document:
    """A text with its title: blocks to be iterated once, whose places count in `unit` ("line", "page" or "row").

    `source` is the document's own address where it has one (a row with an URL), else empty: that of its file.
    `title` may become known only while the blocks are read.
    """

    blocks: Iterator[Block]
    unit: str
    title: str = ""
    source: str = ""


@dataclass
class ReadOptions:
    """How files are read: names of the fields of rows (None: found by their usual names), and limits of size.

    `notes` takes what was left out of a file that was read all the same.
    """

    text_field: str | None = None
    title_field: str | None = None
    source_field: str | None = None
    max_bytes: int = 64 << 20  # of a file that is read whole: HTML and PDF
    max_pages: int = 5000
    notes: list[str] = field(default_factory=list)


def place(unit: str, first: int, last: int) -> str:
    """Where a passage stands: `line 3`, `lines 10-20`, `page 2`, `row 7`."""
    return f"{unit} {first}" if first == last else f"{unit}s {first}-{last}"


def clean(text: str) -> str:
    """Text without control characters and soft hyphens; newlines and tabs stay, a carriage return before one goes."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)


def one_line(text: str, limit: int = 200) -> str:
    """A title on one line, cut at `limit` characters."""
    return " ".join(clean(text).split())[:limit]


def paragraphs(text: str, number: int) -> Iterator[Block]:
    """The paragraphs of a text that stands at one page or row `number`."""
    for part in re.split(r"\n[ \t]*\n\s*", clean(text)):
        if part.strip():
            yield from pieces(Block(part.strip("\n").rstrip(), number, number))


def pieces(block: Block) -> Iterator[Block]:
    """A block, or several where it is too long to be held against a limit of tokens at once."""
    text, start = block.text, 0
    while start < len(text):
        end = start + _LONGEST
        if end < len(text):
            end = text.rfind("\n", start + 1, end) + 1 or text.rfind(" ", start + 1, end) + 1 or end
        part = text[start:end].rstrip("\n")
        if part.strip():
            yield Block(part, *block.lines(start, start + len(part)), block.level, block.code, block.head)
        start = end
