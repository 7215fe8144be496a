"""What is typed while the shell is busy, and texts that are written in an editor of one's own."""

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from openchatkit.errors import UserError


@contextlib.contextmanager
def unechoed(stream: TextIO | None) -> Iterator[None]:
    """Keep the terminal from showing what is typed meanwhile; it waits for the next prompt. Ctrl-C works as ever."""
    try:
        import termios
    except ImportError:  # not on this system
        yield
        return
    before = None
    with contextlib.suppress(AttributeError, ValueError, OSError, termios.error):  # no terminal
        before = termios.tcgetattr(stream.fileno())
        quiet = [*before]
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(stream.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError, termios.error):  # it is gone
                termios.tcsetattr(stream.fileno(), termios.TCSANOW, before)


def edited(text: str) -> str:
    """What becomes of a text in the editor that VISUAL or EDITOR names. UserError where there is none, or it fails."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UserError("no editor is known: set EDITOR in the environment, to nano or vi for example")
    with tempfile.TemporaryDirectory(prefix="openchatkit-") as folder:
        file = Path(folder) / "question.md"
        file.write_text(text, encoding="utf-8")
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the editor's while it runs
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
