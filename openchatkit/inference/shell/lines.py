"""What was typed or piped in, line by line: lengths, encodings, and lines that belong together.

From a pipe, a line is a line. On a terminal, one that begins with three quotation marks opens a block that ends with
three, behind a command or alone, and one that ends with a backslash goes on in the next.
"""

import re
from collections.abc import Callable
from typing import TextIO

from openchatkit.errors import UserError
from openchatkit.inference.shell.editing import Editing
from openchatkit.inference.shell.output import Output

MAX_LINE = 1 << 20  # characters; far beyond any model's context, and small enough to tokenise in a second or two
PROMPT = ">>> "
MORE = "... "

_FENCE = '"""'
_BLOCK = re.compile(rf"\s*(/\w+\s+)?{_FENCE}")
_CONTINUED = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")


class Lines:
    """Reads until the end of input. With `editing`, a person is prompted for each line."""

    def __init__(self, stdin: TextIO | None, output: Output, *, editing: Editing | None) -> None:
        self._stdin = stdin
        self._output = output
        self._editing = editing
        self._joins = output.interactive
        self._number = 0
        self._unfinished = False

    def read(self) -> str | None:
        """The next line, or lines that belong together; None at the end. UserError for one beyond the limit."""
        self._unfinished = False
        line = self._line(PROMPT)
        if line is None or not self._joins:
            return line
        self._unfinished = True
        text, typed = self._block(line, opened) if (opened := _BLOCK.match(line)) else self._continued(line)
        self._unfinished = False
        if self._editing:
            self._editing.remember(typed)
        return text

    def typed(self) -> bool:
        """Whether Ctrl-C has just ended a line, or a block, in which something stood."""
        return self._unfinished or (self._editing is not None and self._editing.typed())

    def _block(self, line: str, opened: re.Match[str]) -> tuple[str, str]:
        """A block as a command, /say unless another stands before it, and as it was typed."""
        parts = self._more([line[opened.end() :]], lambda part: not part.rstrip().endswith(_FENCE))
        text = "\n".join(parts)
        return (opened[1] or "/say ") + text.rstrip().removesuffix(_FENCE), line[: opened.end()] + text

    def _continued(self, line: str) -> tuple[str, str]:
        parts = self._more([line], lambda part: bool(_CONTINUED.search(part)))
        text = "\n".join([*(part[:-1] for part in parts[:-1]), parts[-1]])
        return text, text

    def _more(self, parts: list[str], goes_on: Callable[[str], bool]) -> list[str]:
        """`parts` and the lines that follow, as long as the last of them goes on."""
        size = len(parts[0])
        while goes_on(parts[-1]) and (more := self._line(MORE)) is not None:
            parts.append(more)
            size += len(more) + 1
            if size > MAX_LINE:
                raise UserError(f"these lines are too long together: expected at most {MAX_LINE} characters")
        return parts

    def _line(self, prompt: str) -> str | None:
        self._number += 1
        if self._editing:
            try:
                line = input(self._editing.prompt(prompt))
            except EOFError:
                self._output.write("\n")
                return None
        else:
            line = self._stdin.readline(MAX_LINE + 1)
            if not line:
                return None
            if len(line) > MAX_LINE and not line.endswith("\n"):
                self._skip()
        if len(line) > MAX_LINE:
            error = UserError(f"line {self._number} of the input is too long: expected at most {MAX_LINE} characters")
            self._output.gap("", error)
            raise error
        if self._number == 1:
            line = line.removeprefix("\ufeff")
        return self._mended(line.rstrip("\r\n"))

    def _skip(self) -> None:
        while (rest := self._stdin.readline(MAX_LINE)) and not rest.endswith("\n"):
            pass

    def _mended(self, line: str) -> str:
        if (whole := mended(line)) != line:
            self._output.note(f"line {self._number} of the input is not all UTF-8; what is not was replaced by \ufffd")
        return whole


def mended(text: str) -> str:
    """`text` with the bytes that are no UTF-8, which arrive as lone surrogates, replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def piped(stdin: TextIO | None, output: Output) -> list[str]:
    """What was piped in, as the one passage of a question; none on a terminal. UserError when it is too long."""
    if stdin is None or stdin.isatty():
        return []
    text = stdin.read(MAX_LINE + 1)
    if len(text) > MAX_LINE:
        raise UserError(f"the piped text is too long: expected at most {MAX_LINE} characters")
    whole = mended(text.removeprefix("\ufeff"))
    if whole != text.removeprefix("\ufeff"):
        output.note("the piped text is not all UTF-8; what is not was replaced by \ufffd")
    return [whole] if whole.strip() else []
