"""The terminal: colours, its width, and hiding what is typed during a reply."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, TextIO


class Style:
    """Marks text on one stream, if that is a terminal, NO_COLOR is unset and TERM is not dumb."""

    def __init__(self, stream: TextIO) -> None:
        self.on = stream.isatty() and knows_escapes() and not os.environ.get("NO_COLOR")

    def dim(self, text: str) -> str:
        return self._mark(text, "2")

    def red(self, text: str) -> str:
        return self._mark(text, "31")

    def prompt(self, text: str) -> str:
        """Return a prompt in bold, with readline's marks around what takes no column."""
        return f"\x01\x1b[1m\x02{text}\x01\x1b[0m\x02" if self.on else text

    def _mark(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.on else text


def knows_escapes() -> bool:
    """Whether the terminal says that it knows control sequences."""
    return os.environ.get("TERM", "") not in ("", "dumb")


def columns_of(stream: TextIO) -> int | None:
    """Return the width of a terminal; None for a stream that is no terminal, or a terminal that does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


@contextlib.contextmanager
def no_echo(stream: IO[str] | None) -> Iterator[None]:
    """Keep the terminal from showing what is typed; it waits for the next prompt. Ctrl-C works as always."""
    try:
        import termios
    except ImportError:  # not on this system
        stream = None
    if stream is None:
        yield
        return
    before = None
    with contextlib.suppress(AttributeError, ValueError, OSError, termios.error):  # no terminal
        before = termios.tcgetattr(stream.fileno())
        silent = [*before]
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(stream.fileno(), termios.TCSANOW, silent)
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError, termios.error):  # it is gone
                termios.tcsetattr(stream.fileno(), termios.TCSANOW, before)
