"""Colours, for a terminal that has them and a user who wants them."""

import os
from typing import TextIO


class Style:
    """How a text is marked on one stream: not at all unless it is a terminal, NO_COLOR is unset and TERM not dumb."""

    def __init__(self, stream: TextIO) -> None:
        self.on = stream.isatty() and capable() and not os.environ.get("NO_COLOR")

    def dim(self, text: str) -> str:
        return self._marked(text, "2")

    def red(self, text: str) -> str:
        return self._marked(text, "31")

    def prompt(self, text: str) -> str:
        """In bold, with readline's marks around what takes no column."""
        return f"\x01\x1b[1m\x02{text}\x01\x1b[0m\x02" if self.on else text

    def _marked(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.on else text


def capable() -> bool:
    """Whether the terminal says that it knows control sequences."""
    return os.environ.get("TERM", "") not in ("", "dumb")
