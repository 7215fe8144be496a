"""The output of readers: documents as sequences of blocks with their places, and the reason why a file is unreadable.

A document is read once, from its start, and need not be in memory as a whole. `chunks` makes passages of blocks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Control characters other than tab and newline, and characters that no text contains.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), 0xFEFF], " ")
_CONTROLS[0xAD] = ""  # a hyphen that is shown only at the end of a line
_LONGEST = 1 << 14  # characters of a block; a longer paragraph is cut, at a line or else anywhere


class Unreadable(Exception):
    """The reason why a file cannot be read: one clause, for the list of skipped files."""


@dataclass(frozen=True)
class Block:
    """A heading, a paragraph or a piece of code; `first` and `last` count lines, pages or rows from 1.

    `level` is 1 and above for headings, 0 otherwise. `head` is the header of the table that a block belongs to: each of
    its passages repeats it.
    """

    text: str
    first: int
    last: int
    level: int = 0
    code: bool = False
    head: str = ""

    def lines(self, start: int, end: int) -> tuple[int, int]:
        """Return the first and last line of the characters from `start` to `end`, if each line is known."""
        if self.text.count("\n") != self.last - self.first:
            return self.first, self.last
        first = self.first + self.text.count("\n", 0, start)
        return first, first + self.text.count("\n", start, end)


@dataclass
class Document:
    """A text with its title: blocks to iterate once, with places in `unit` ("line", "page" or "row").

    `source` is the document's own address if it has one (a row with a URL), else empty: that of its file applies.
    `title` may become known only while the blocks are read.
    """

    blocks: Iterator[Block]
    unit: str
    title: str = ""
    source: str = ""


@dataclass
class ReadOptions:
    """How files are read: names of the fields of rows (None: found by their usual names), and limits of size.

    `notes` collects what was excluded from a file that was read.
    """

    text_field: str | None = None
    title_field: str | None = None
    source_field: str | None = None
    max_bytes: int = 64 << 20  # of a file that is read whole: HTML and PDF
    max_pages: int = 5000
    notes: list[str] = field(default_factory=list)


def place(unit: str, first: int, last: int) -> str:
    """Format the place of a passage: `line 3`, `lines 10-20`, `page 2`, `row 7`."""
    return f"{unit} {first}" if first == last else f"{unit}s {first}-{last}"


def clean(text: str) -> str:
    """Replace control characters by spaces, carriage returns by newlines, and drop soft hyphens."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)


def one_line(text: str, limit: int = 200) -> str:
    """Put a title on one line, cut at `limit` characters."""
    return " ".join(clean(text).split())[:limit]


def paragraphs(text: str, number: int) -> Iterator[Block]:
    """Yield the paragraphs of a text at page or row `number`."""
    for part in re.split(r"\n[ \t]*\n\s*", clean(text)):
        if part.strip():
            yield from pieces(Block(part.strip("\n").rstrip(), number, number))


def pieces(block: Block) -> Iterator[Block]:
    """Yield a block, or several if it is too long for counting its tokens at once."""
    text, start = block.text, 0
    while start < len(text):
        end = start + _LONGEST
        if end < len(text):
            end = text.rfind("\n", start + 1, end) + 1 or text.rfind(" ", start + 1, end) + 1 or end
        part = text[start:end].rstrip("\n")
        if part.strip():
            yield Block(part, *block.lines(start, start + len(part)), block.level, block.code, block.head)
        start = end
