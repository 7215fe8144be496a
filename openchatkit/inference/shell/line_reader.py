"""Reading typed or piped lines: their length, their encoding, and lines that belong together.

In a pipe, each line is one question or command. On a terminal, three quotation marks, alone or after a command, open a
block that ends with three, and a line that ends with a backslash continues in the next.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from openchatkit.errors import UserError
from openchatkit.inference.shell.output import Output
from openchatkit.texts import MAX_LINE

if TYPE_CHECKING:
    from openchatkit.inference.shell.editing import LineEditor

PROMPT = ">>> "
_MORE = "... "

_FENCE = '"""'
_BLOCK = re.compile(rf"\s*(/\w+\s+)?{_FENCE}")
_CONTINUED = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")


class LineReader:
    """Reads until the end of input; with an `editor`, from a person who is prompted for each line."""

    def __init__(self, stdin: TextIO | None, output: Output, *, editor: "LineEditor | None") -> None:
        self._stdin = stdin
        self._output = output
        self._editor = editor
        self._joins = output.interactive
        self._number = 0
        self._unfinished = False

    def read(self) -> str | None:
        """Return the next line, or lines that belong together; None at the end. UserError: it is too long."""
        self._unfinished = False
        line = self._read_line(PROMPT)
        if line is None or not self._joins:
            return line
        self._unfinished = True
        text, typed = self._read_block(line, opened) if (opened := _BLOCK.match(line)) else self._read_continued(line)
        self._unfinished = False
        if self._editor:
            self._editor.remember(typed)
        return text

    def has_text(self) -> bool:
        """Whether the line or block that Ctrl-C has just ended has any text."""
        return self._unfinished or (self._editor is not None and self._editor.has_text())

    def _read_block(self, line: str, opened: re.Match[str]) -> tuple[str, str]:
        """Read a block; return it as a command, /say unless another comes before it, and as it was typed."""
        parts = self._read_more([line[opened.end() :]], lambda part: not part.rstrip().endswith(_FENCE))
        text = "\n".join(parts)
        return (opened[1] or "/say ") + text.rstrip().removesuffix(_FENCE), line[: opened.end()] + text

    def _read_continued(self, line: str) -> tuple[str, str]:
        parts = self._read_more([line], lambda part: bool(_CONTINUED.search(part)))
        text = "\n".join([*(part[:-1] for part in parts[:-1]), parts[-1]])
        return text, text

    def _read_more(self, parts: list[str], goes_on: Callable[[str], bool]) -> list[str]:
        """Return `parts` and the lines that follow, for as long as the last one `goes_on`."""
        size = len(parts[0])
        while goes_on(parts[-1]) and (more := self._read_line(_MORE)) is not None:
            parts.append(more)
            size += len(more) + 1
            if size > MAX_LINE:
                raise UserError(f"these lines are too long together: expected at most {MAX_LINE} characters")
        return parts

    def _read_line(self, prompt: str) -> str | None:
        self._number += 1
        if self._editor:
            try:
                line = input(self._editor.prompt(prompt))
            except EOFError:
                self._output.write("\n")
                return None
        else:
            assert self._stdin is not None
            line = self._stdin.readline(MAX_LINE + 1)
            if not line:
                return None
            if len(line) > MAX_LINE and not line.endswith("\n"):
                _skip_line(self._stdin)
        if len(line) > MAX_LINE:
            error = UserError(f"line {self._number} of the input is too long: expected at most {MAX_LINE} characters")
            self._output.skip_reply("", error)
            raise error
        if self._number == 1:
            line = line.removeprefix("\ufeff")
        return self._replace_invalid(line.rstrip("\r\n"))

    def _replace_invalid(self, line: str) -> str:
        if (whole := _replace_invalid(line)) != line:
            self._output.note(f"line {self._number} of the input is not all UTF-8; what is not was replaced by \ufffd")
        return whole


def _skip_line(stdin: TextIO) -> None:
    while (rest := stdin.readline(MAX_LINE)) and not rest.endswith("\n"):
        pass


def _replace_invalid(text: str) -> str:
    """Return `text` with bytes that are not UTF-8, which arrive as lone surrogates, replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_passage(stdin: TextIO | None, output: Output) -> list[str]:
    """Read piped text as the one passage of a question; none on a terminal. UserError: it is too long."""
    if stdin is None or stdin.isatty():
        return []
    text = stdin.read(MAX_LINE + 1)
    if len(text) > MAX_LINE:
        raise UserError(f"the piped text is too long: expected at most {MAX_LINE} characters")
    whole = _replace_invalid(text.removeprefix("\ufeff"))
    if whole != text.removeprefix("\ufeff"):
        output.note("the piped text is not all UTF-8; what is not was replaced by \ufffd")
    return [whole] if whole.strip() else []
