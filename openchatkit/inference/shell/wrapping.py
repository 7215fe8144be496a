"""Breaking a reply's lines between words at a terminal's edge, as the reply comes.

A word is held back until it is whole. Code between ``` fences is left to the terminal, as is a word that is longer than
a line: what is copied from there must be what was said.
"""

import os
import re
import unicodedata
from typing import TextIO

_PARTS = re.compile(r"\n|[^\S\n]+|[^\s]+")
_FENCE = "```"


class Wrapper:
    """Text in pieces to lines of at most `columns`; None leaves them as they are."""

    def __init__(self, columns: int | None) -> None:
        self._columns = columns
        self._column = 0
        self._space = ""  # before the word that is held back
        self._word = ""
        self._whole = True  # whether the word's beginning is held back, too
        self._begins = True  # whether no word of the line has been let out yet
        self._code = False

    def push(self, text: str) -> str:
        """What can be shown: all but an unfinished word."""
        if self._columns is None:
            return text
        shown = []
        for part in _PARTS.findall(text):
            if part == "\n":
                shown += [self._place(), self._space if self._code else "", part]
                self._column, self._space, self._begins = 0, "", True
            elif part.isspace():
                shown.append(self._place())
                self._space += part
            else:
                shown += map(self._lengthen, part)
        return "".join(shown)

    def flush(self) -> str:
        """The rest."""
        return self._place() + self._space

    def _lengthen(self, character: str) -> str:
        """Add a character to the word; what that lets out. Between wide ones, as Chinese has them, a line may break."""
        shown = ""
        if _width(character) == 2 or (self._word and _width(self._word[-1]) == 2 and character.isalnum()):
            shown = self._place()
        self._word += character
        if _width(self._word) >= self._columns:
            shown += self._place()
            self._whole = False
        return shown

    def _place(self) -> str:
        """The word that was held back, behind its space or on the next line."""
        if not self._word:
            self._whole = self._whole or bool(self._space)
            return ""
        space, word, whole = self._space, self._word, self._whole or bool(self._space)
        self._space, self._word, self._whole = "", "", True
        if self._begins and word.startswith(_FENCE):
            self._code = not self._code
        width = _width(space) + _width(word)
        breaks = whole and not self._code and not self._begins and self._column + width > self._columns
        self._begins = False
        if breaks:
            self._column = _width(word)
            return "\n" + word
        # The terminal itself breaks what is longer than a line.
        self._column = self._column + width if self._column + width <= self._columns else width % self._columns
        return space + word


def columns_of(stream: TextIO) -> int | None:
    """The width of the terminal that a stream is, None if it is none or does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def _width(text: str) -> int:
    """About how many columns a terminal takes for a text."""
    if text.isascii():
        return len(text)
    shown = [part for part in text if unicodedata.category(part) not in ("Mn", "Me", "Cf")]
    return sum(2 if unicodedata.east_asian_width(part) in "WF" else 1 for part in shown)
