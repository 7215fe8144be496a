"""Editing a line before it is sent: history, completion and pastes, where Python was built with readline.

Without it everything works but these, and the terminal's own few keys are what there is.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from openchatkit.inference.shell import history
from openchatkit.inference.shell.style import Style, capable

# The line up to the word, and the word: what it can become.
Complete = Callable[[str, str], list[str]]


class Editing:
    """The one line editor of the process. `note` is told once if the history cannot be kept; without a path none is."""

    def __init__(self, complete: Complete, *, path: Path | None, style: Style, note: Callable[[str], None]) -> None:
        self._complete = complete
        self._path = path
        self._style = style
        self._note = note
        self._candidates: list[str] = []
        self._readline = _readline()

    def start(self) -> None:
        """Fetch the history of earlier runs, and take the keys."""
        if (readline := self._readline) is None:
            return
        # An entry may be made of several lines, so what becomes one is ours to say.
        readline.set_auto_history(False)
        readline.set_completer(self._candidate)
        readline.set_completer_delims(" \t\n")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if capable():
                # What is pasted stays in the line until Enter is pressed, however many lines it has.
                readline.parse_and_bind("set enable-bracketed-paste on")
        if self._path is None:
            return
        try:
            entries = history.read(self._path)
        except OSError as error:
            self._give_up(error)
        else:
            for entry in entries:
                readline.add_history(entry)

    def prompt(self, text: str) -> str:
        """A prompt as the line editor takes it."""
        return text if self._readline is None else self._style.prompt(text)

    def remember(self, text: str) -> None:
        """Add what was typed to the history, now and for later runs."""
        readline = self._readline
        if readline is None or not text.strip():
            return
        length = readline.get_current_history_length()
        if length and readline.get_history_item(length) == text:
            return
        readline.add_history(text)
        if self._path is not None:
            try:
                history.append(self._path, text)
            except OSError as error:
                self._give_up(error)

    def typed(self) -> bool:
        """Whether something stands in the line that Ctrl-C has just ended."""
        return self._readline is not None and bool(self._readline.get_line_buffer())

    def _give_up(self, error: OSError) -> None:
        self._note(f"what is typed is not kept for later: {self._path}: {error.strerror}")
        self._path = None

    def _candidate(self, word: str, number: int) -> str | None:
        if number == 0:
            head = self._readline.get_line_buffer()[: self._readline.get_begidx()]
            # readline drops what a completer raises; nothing of it may reach the line being typed.
            self._candidates = self._complete(head, word)
        return self._candidates[number] if number < len(self._candidates) else None


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline
