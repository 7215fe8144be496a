"""Editing of what is typed: in the line, or in the user's own editor.

History, completion and pastes of several lines need a Python with readline. The rest works without it, with the
terminal's own few keys.
"""

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from openchatkit.errors import UserError
from openchatkit.inference.shell import history
from openchatkit.inference.shell.terminal import Style, knows_escapes

# (the line up to the word, the word) -> completions of the word
_Complete = Callable[[str, str], list[str]]


class LineEditor:
    """The one line editor of the process. It keeps no history without a `path`, or after an error, which it notes."""

    def __init__(self, complete: _Complete, *, path: Path | None, style: Style, note: Callable[[str], None]) -> None:
        self._complete = complete
        self._path = path
        self._style = style
        self._note = note
        self._candidates: list[str] = []
        self._readline = _import_readline()

    def start(self) -> None:
        """Load the history of earlier runs, and set up the keys."""
        if (readline := self._readline) is None:
            return
        # An entry may have several lines, so `remember` adds it.
        readline.set_auto_history(False)
        readline.set_completer(self._candidate)
        readline.set_completer_delims(" \t\n")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if knows_escapes():
                # A paste stays in the line until Enter is pressed, however many lines it has.
                readline.parse_and_bind("set enable-bracketed-paste on")
        if self._path is None:
            return
        try:
            entries = history.read(self._path)
        except OSError as error:
            self._disable_history(error)
        else:
            for entry in entries:
                readline.add_history(entry)

    def prompt(self, text: str) -> str:
        """Return a prompt as the line editor needs it."""
        return text if self._readline is None else self._style.prompt(text)

    def remember(self, text: str) -> None:
        """Add a text to the history, of this run and of later ones."""
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
                self._disable_history(error)

    def has_text(self) -> bool:
        """Whether the line that Ctrl-C has just ended has any text."""
        return self._readline is not None and bool(self._readline.get_line_buffer())

    def _disable_history(self, error: OSError) -> None:
        self._note(f"what is typed is not kept for later: {self._path}: {error.strerror}")
        self._path = None

    def _candidate(self, word: str, number: int) -> str | None:
        if number == 0:
            assert self._readline is not None
            head = self._readline.get_line_buffer()[: self._readline.get_begidx()]
            # Must not raise or print: readline ignores errors, and output would mix with the line being typed.
            self._candidates = self._complete(head, word)
        return self._candidates[number] if number < len(self._candidates) else None


def edit_text(text: str) -> str:
    """Return a text as the user changed it in the editor that VISUAL or EDITOR names. UserError if that fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UserError("no editor is known: set EDITOR in the environment, to nano or vi for example")
    with tempfile.TemporaryDirectory(prefix="openchatkit-") as folder:
        file = Path(folder) / "question.md"
        file.write_text(text, encoding="utf-8")
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # while it runs, Ctrl-C is for the editor
        try:
            status = subprocess.run([*shlex.split(editor), str(file)], check=False).returncode
            if status:
                raise UserError(f"the editor {editor} ended with status {status}: nothing was asked")
            return file.read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the editor {editor} cannot be run: {reason}; EDITOR names another") from error
        finally:
            signal.signal(signal.SIGINT, before)


def _import_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline
