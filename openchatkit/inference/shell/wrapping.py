"""Wrapping a streamed reply between words at a terminal's edge.

A word is held back until it is complete. Code between ``` fences, and a word longer than a line, are left to the
terminal, so that copying them gives the text of the reply.
"""

import re
import unicodedata

_PARTS = re.compile(r"\n|[^\S\n]+|[^\s]+")
_FENCE = "```"


class LineWrapper:
    """Breaks text that comes in pieces into lines of at most `columns`; None leaves it unchanged."""

    def __init__(self, columns: int | None) -> None:
        self._columns = columns or 0
        self._column = 0
        self._space = ""  # before the word that is held back
        self._word = ""
        self._whole = True  # whether the word's beginning is held back too
        self._at_start = True  # whether no word of the line has been returned yet
        self._code = False

    def push(self, text: str) -> str:
        """Return the text that can be shown: all but an unfinished word."""
        if not self._columns:
            return text
        shown = []
        for part in _PARTS.findall(text):
            if part == "\n":
                shown += [self._place(), self._space if self._code else "", part]
                self._column, self._space, self._at_start = 0, "", True
            elif part.isspace():
                shown.append(self._place())
                self._space += part
            else:
                shown += map(self._extend_word, part)
        return "".join(shown)

    def flush(self) -> str:
        """Return the rest."""
        return self._place() + self._space

    def _extend_word(self, character: str) -> str:
        """Add a character to the word, and return text that became final. A line may break between wide characters."""
        shown = ""
        if _width(character) == 2 or (self._word and _width(self._word[-1]) == 2 and character.isalnum()):
            shown = self._place()
        self._word += character
        if _width(self._word) >= self._columns:
            shown += self._place()
            self._whole = False
        return shown

    def _place(self) -> str:
        """Return the word that was held back, after its space or on the next line."""
        if not self._word:
            self._whole = self._whole or bool(self._space)
            return ""
        space, word, whole = self._space, self._word, self._whole or bool(self._space)
        self._space, self._word, self._whole = "", "", True
        if self._at_start and word.startswith(_FENCE):
            self._code = not self._code
        width = _width(space) + _width(word)
        breaks = whole and not self._code and not self._at_start and self._column + width > self._columns
        self._at_start = False
        if breaks:
            self._column = _width(word)
            return "\n" + word
        # The terminal itself breaks what is longer than a line.
        self._column = self._column + width if self._column + width <= self._columns else width % self._columns
        return space + word


def _width(text: str) -> int:
    """Return about how many columns a terminal needs for a text."""
    if text.isascii():
        return len(text)
    shown = [part for part in text if unicodedata.category(part) not in ("Mn", "Me", "Cf")]
    return sum(2 if unicodedata.east_asian_width(part) in "WF" else 1 for part in shown)
