"""HTML as blocks, by the parser of the standard library: no network, no scripts, only visible text."""

import codecs
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from openchatkit.retrieval.reading import encodings, streams
from openchatkit.retrieval.reading.document import Block, Document, ReadOptions, clean, one_line, pieces

_DROPPED = {
    *("canvas", "iframe", "math", "noscript", "object", "script", "select", "style", "svg", "template", "textarea")
}
_INLINE = {
    *("a", "abbr", "acronym", "b", "bdi", "bdo", "big", "button", "cite", "code", "data", "del", "dfn", "em", "font"),
    *("i", "img", "input", "ins", "kbd", "label", "mark", "meter", "output", "picture", "progress", "q", "ruby", "rp"),
    *("rt", "s", "samp", "small", "source", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"),
}
_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# The encodings that pages mean by other names (the WHATWG's Encoding Standard): Western pages contain the quotes and
# dashes of Windows, and a page whose encoding can be read in ASCII is not UTF-16.
_MEANT = {
    **{"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "utf-16": "utf-8", "utf-16-le": "utf-8"},
    **{"utf-16-be": "utf-8", "gb2312": "gbk", "euc_kr": "cp949", "shift_jis": "cp932"},
}
_SNIFFED = 4096  # bytes that may name an encoding


def html(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read an HTML page, titled by its title, its first heading, or its file name; lines are those of its source."""
    parser = _parse(streams.whole(path, options.max_bytes), options.notes)
    heading = next((block.text for block in parser.blocks if block.level), "")
    yield Document(iter(parser.blocks), "line", one_line(parser.title) or heading or streams.stem(path))


def blocks(data: bytes, notes: list[str]) -> list[Block]:
    """Return the blocks of a page."""
    return _parse(data, notes).blocks


def _parse(data: bytes, notes: list[str]) -> "_Parser":
    parser = _Parser()
    parser.feed(_decode(data, notes))
    parser.close()
    parser.end_block()
    return parser


def _decode(data: bytes, notes: list[str]) -> str:
    found = _CHARSET.search(data[:_SNIFFED])
    named = found[1].decode("ascii") if found else "utf-8"
    try:
        encoding = encodings.detect_mark(data) or _resolve_encoding(named)
    except LookupError:
        notes.append(f"names an encoding that is not known, {named}")
        encoding = "utf-8"
    return encodings.decode(data, encoding, notes)


def _resolve_encoding(name: str) -> str:
    found = codecs.lookup(name).name
    return _MEANT.get(found, found)


class _Parser(HTMLParser):
    """Collects `blocks` and the `title`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.title = ""
        self._text: list[str] = []
        self._first = self._last = 0
        self._level = 0
        self._code = 0  # how many <pre> are open
        self._head = ""  # the row of <th> at the start of the table
        self._cells: set[str] = set()  # kinds of cells in the row
        self._dropped: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped or tag in _DROPPED:
            if tag in _DROPPED:
                self._dropped.append(tag)
        elif tag == "title":
            self._in_title = not self.title
        elif tag == "br":
            self._text.append("\n")
        elif tag in ("td", "th"):
            self._cells.add(tag)
            self._text.append(" | " if "".join(self._text).strip() else "")
        elif tag not in _INLINE:
            self.end_block()
            self._head = "" if tag == "table" else self._head
            self._code += tag == "pre"
            self._level = int(tag[1]) if re.fullmatch("h[1-6]", tag) else 0
            if tag == "li":
                self._text.append("- ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # In HTML the slash has no meaning, but <script/> of XHTML must not swallow the rest of the page.
        if tag not in _DROPPED and tag != "title":
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            if tag in self._dropped:
                del self._dropped[self._dropped.index(tag) :]
        elif tag == "title":
            self._in_title = False
        elif tag not in _INLINE and tag not in ("td", "th", "br"):
            self.end_block()
            self._head = "" if tag == "table" else self._head
            self._code = max(self._code - (tag == "pre"), 0)
            self._level = 0

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if self._in_title:
            self.title += data
            return
        if data.strip():
            start = self.getpos()[0]
            self._first = self._first or start + data[: len(data) - len(data.lstrip())].count("\n")
            self._last = start + data.rstrip().count("\n")
        self._text.append(data if self._code else " ".join(re.split(r"[\r\n]", data)))

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Skip `<![...]>`; contents that the library does not know are skipped like a comment."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def end_block(self) -> None:
        """Make a block of the text since the last one."""
        text, self._text = clean("".join(self._text)), []
        if self._code:
            text = text.strip("\n").rstrip()
        else:
            text = "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
        if text.strip(" -|\n") and self._first:
            head = self._head if self._cells else ""
            block = Block(text, self._first, self._last, level=self._level, code=bool(self._code), head=head)
            self.blocks += [block] if self._level else pieces(block)
            self._head = text if self._cells == {"th"} else self._head
        self._first = self._last = 0
        self._cells = set()
