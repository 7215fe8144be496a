"""Plain text, code, Markdown and reStructuredText as blocks: headings, paragraphs and code with their lines.

All are read line by line, so that a file of any size takes little memory. Markup inside a paragraph stays as it is
written: readers know it by that, and encoders cope with it.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from openchatkit.retrieval.reading import streams
from openchatkit.retrieval.reading.document import Block, Document, ReadOptions, clean, one_line, pieces

_NumberedLines = Iterator[tuple[int, str]]

_MOST_LINES = 400  # of a paragraph: logs have no empty lines
_MOST_FRONT_LINES = 200
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t](.*))?")
_SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CELL_UNDER_HEADER = r":?-+:?[ \t]*"
_UNDER_HEADER = re.compile(rf"[ \t]*(?=.*\|)(\|[ \t]*)?{_CELL_UNDER_HEADER}(\|[ \t]*{_CELL_UNDER_HEADER})*(\|[ \t]*)?")
_NO_TITLE = re.compile(r"\s*([-*+>|]|\d+[.)])(\s|$)")
_FRONT_TITLE = re.compile(r"title:\s*(.+)")
# reStructuredText: an underline repeats one mark; and the directives whose content is code.
_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1+\s*")
_CODE = re.compile(r"\s*\.\. (code|code-block|sourcecode|parsed-literal|highlight)::.*")
_DIRECTIVE = re.compile(r"\s*\.\. [\w-]+::")


def text(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read a plain text, titled by its file name."""
    yield Document(_paragraphs(_clean_lines(path, options)), "line", streams.stem(path))


def code(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read source code or a file of settings, titled by its whole name; cut at empty lines, then at others."""
    yield Document(_paragraphs(_clean_lines(path, options), code=True), "line", streams.plain_name(path))


def markdown(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read Markdown, titled by its front matter, its first heading if it begins with one, or its file name."""
    title, lines = _front_matter(_clean_lines(path, options))
    yield _add_title(title, _markdown(lines), path)


def restructured(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read reStructuredText, titled by its first heading if it begins with one, or its file name."""
    yield _add_title("", _restructured(_clean_lines(path, options)), path)


def _clean_lines(path: Path, options: ReadOptions) -> _NumberedLines:
    return ((number, clean(line)) for number, line in streams.lines(path, options.notes))


def _add_title(title: str, blocks: Iterator[Block], path: Path) -> Document:
    first = list(itertools.islice(blocks, 1))
    if first and first[0].level:
        title = title or first[0].text
    return Document(itertools.chain(first, blocks), "line", one_line(title) or streams.stem(path))


class _Gathering:
    """The lines so far of a paragraph or a piece of code."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def add(self, number: int, line: str, *, code: bool = False, head: str = "") -> Iterator[Block]:
        """Add a line; yield the lines so far when they are too many."""
        if len(self.lines) == _MOST_LINES:
            yield from self.take(code=code, head=head)
        self.lines.append((number, line.rstrip()))

    def take(self, *, code: bool = False, head: str = "") -> Iterator[Block]:
        """Yield the lines so far as blocks; nothing if they are blank."""
        lines, self.lines = self.lines, []
        while lines and not lines[-1][1]:
            lines.pop()
        while lines and not lines[0][1]:
            lines.pop(0)
        if lines:
            text = "\n".join(line for _, line in lines)
            yield from pieces(Block(text, lines[0][0], lines[-1][0], code=code, head=head))


def _paragraphs(lines: _NumberedLines, *, code: bool = False) -> Iterator[Block]:
    gathered = _Gathering()
    for number, line in lines:
        yield from gathered.add(number, line, code=code) if line.strip() else gathered.take(code=code)
    yield from gathered.take(code=code)


def _front_matter(lines: _NumberedLines) -> tuple[str, _NumberedLines]:
    """Return the title in the front matter between `---`, and the lines after it."""
    held = list(itertools.islice(lines, 1))
    if not held or held[0][1].rstrip() != "---":
        return "", itertools.chain(held, lines)
    title = ""
    for number, line in lines:
        held.append((number, line))
        if line.rstrip() in ("---", "..."):
            return title, lines
        if found := _FRONT_TITLE.fullmatch(line.rstrip()):
            title = _unquote(found[1])
        if len(held) > _MOST_FRONT_LINES:
            break
    return "", itertools.chain(held, lines)  # a horizontal rule, not front matter


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _strip_closing(title: str) -> str:
    """Strip white space and closing number signs, which a space parts from the title."""
    title = title.strip()
    opening = title.rstrip("#")
    return title if opening and not opening[-1].isspace() else opening.rstrip()


def _markdown(lines: _NumberedLines) -> Iterator[Block]:
    gathered, fence, head = _Gathering(), "", ""
    for number, line in lines:
        mark = _FENCE.match(line)
        if head and "|" in line:
            yield from gathered.add(number, line, head=head)
            continue
        if head:
            yield from gathered.take(head=head)
            head = ""
        if fence:
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
                yield from gathered.take(code=True)
            else:
                yield from gathered.add(number, line, code=True)
        elif mark:
            yield from gathered.take()
            fence = mark[1]
        elif heading := _ATX.fullmatch(line):
            yield from gathered.take()
            if title := _strip_closing(heading[2] or ""):
                yield Block(one_line(title), number, number, level=len(heading[1]))
        elif _UNDER_HEADER.fullmatch(line) and gathered.lines and "|" in gathered.lines[-1][1]:
            header = gathered.lines.pop()
            yield from gathered.take()
            gathered.lines = [header, (number, line.rstrip())]
            head = f"{header[1]}\n{line.rstrip()}"
        elif (under := _SETEXT.fullmatch(line)) and _is_title(gathered):
            [(first, title)], gathered.lines = gathered.lines, []
            yield Block(one_line(title), first, number, level=1 if under[1][0] == "=" else 2)
        else:
            yield from gathered.add(number, line) if line.strip() else gathered.take()
    yield from gathered.take(code=bool(fence), head=head)


def _is_title(gathered: _Gathering) -> bool:
    """Whether the text above a line of dashes is one line of prose, not the end of a list or table."""
    return len(gathered.lines) == 1 and not _NO_TITLE.match(gathered.lines[0][1])


def _restructured(lines: _NumberedLines) -> Iterator[Block]:
    gathered = _Gathering()
    levels: list[tuple[str, bool]] = []  # (mark, whether it is above the title too), by first use
    base: int | None = None  # the indentation of the text that announced code, while code may follow
    in_code = False
    for number, line in lines:
        indent = len(line) - len(line.lstrip())
        if base is not None and line.strip():
            if indent > base and not gathered.lines:
                in_code = True
            elif in_code and indent <= base:
                yield from gathered.take(code=True)
                in_code, base = False, None
            elif not in_code:
                base = None
        if in_code:
            yield from gathered.add(number, line, code=True)
        elif not line.strip():
            base = _code_indentation(gathered)
            yield from _take_prose(gathered)
        elif heading := _parse_heading(gathered, line):
            title, style, first = heading
            gathered.lines = []
            if style not in levels:
                levels.append(style)
            yield Block(title, first, number, level=levels.index(style) + 1)
        else:
            yield from gathered.add(number, line)
    yield from gathered.take(code=True) if in_code else _take_prose(gathered)


def _parse_heading(gathered: _Gathering, line: str) -> tuple[str, tuple[str, bool], int] | None:
    """Return (title, style, first line) if `line` underlines the lines so far."""
    if not _ADORNMENT.fullmatch(line) or not 1 <= len(gathered.lines) <= 2:
        return None
    (first, above), (_, title) = gathered.lines[0], gathered.lines[-1]
    overlined = len(gathered.lines) == 2
    if overlined and above != line.rstrip():
        return None
    if _ADORNMENT.fullmatch(title) or len(line.rstrip()) < len(title.strip()):
        return None
    return one_line(title), (line[0], overlined), first


def _code_indentation(gathered: _Gathering) -> int | None:
    """Return the indentation of a paragraph that announces code: further indented text below it."""
    if not gathered.lines:
        return None
    first, last = gathered.lines[0][1], gathered.lines[-1][1]
    if _CODE.match(first) or (last.endswith("::") and not _DIRECTIVE.match(first)):
        return len(first) - len(first.lstrip())
    return None


def _take_prose(gathered: _Gathering) -> Iterator[Block]:
    """Yield a paragraph of reStructuredText; a line of marks alone is a rule and is dropped."""
    if len(gathered.lines) == 1 and _ADORNMENT.fullmatch(gathered.lines[0][1]):
        gathered.lines = []
    yield from gathered.take()
