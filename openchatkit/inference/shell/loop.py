"""The loop of the chat shell: lines in, commands and questions out, and Ctrl-C.

On a terminal it prompts and survives Ctrl-C. From a pipe it reads one question or command a line.
"""

import cmd
import difflib
import os
import signal
from collections.abc import Iterable
from typing import Any, TextIO

from openchatkit.errors import UserError
from openchatkit.formats import chat_file
from openchatkit.inference.shell.line_reader import PROMPT, LineReader
from openchatkit.inference.shell.output import Output, Unwritable
from openchatkit.inference.shell.terminal import Style
from openchatkit.inference.streaming import clean

# Names of commands in other shells.
_ALIASES = {"?": "help", "bye": "quit", "exit": "quit", "clear": "reset"}
_BARE = ("exit", "quit", "help")


class CommandLoop(cmd.Cmd):
    """Reads lines and executes them until the end of input, or a command that returns true.

    A subclass has the commands, methods `do_NAME`, of which `do_say` asks a question. `about` describes the model in
    the welcome.
    """

    intro = "Welcome to OpenChatKit shell.   Type /help or /? to list commands.\n"
    prompt = PROMPT

    def __init__(self, output: Output, *, stdin: TextIO | None, stdout: TextIO, about: str = "") -> None:
        super().__init__(stdin=stdin, stdout=stdout)
        self._about = about
        self._output = output
        self._editor = None
        if output.interactive and stdout.isatty():
            path = None if chat_file.unwritable_reason() else chat_file.history_path()
            from openchatkit.inference.shell.editing import LineEditor

            self._editor = LineEditor(self.completions, path=path, style=Style(stdout), note=output.note)
        self._reader = LineReader(stdin, output, editor=self._editor)
        self._reading = False
        self._pressed = False

    def cmdloop(self, intro: Any = None) -> None:
        """Read and execute lines. cmd.Cmd's own loop takes a line that says EOF for the end of input.

        Raises KeyboardInterrupt when Ctrl-C is pressed twice at the prompt, or once where nobody types.
        """
        if self._editor:
            if self._about:
                self._output.confirm(self._about)
            self._output.write(intro or self.intro)
            self._editor.start()
        if self._output.interactive:
            # From here on Ctrl-C does not end the command, nor explain later errors.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        while True:
            try:
                line = self._read()
                if line is None or self.onecmd(line):
                    return
            except Unwritable:
                raise
            except UserError as error:
                self._output.report_error(error)
            except KeyboardInterrupt:
                self._handle_interrupt()

    def _read(self) -> str | None:
        self._reading = True
        line = self._reader.read()
        self._reading = self._pressed = False
        return line

    def _handle_interrupt(self) -> None:
        """Handle Ctrl-C: at the prompt it clears the line, and leaves if pressed twice with nothing typed."""
        if not self._output.interactive:
            raise KeyboardInterrupt
        self._output.write("\n")
        if not self._reading:
            self._output.note("interrupted")
        elif self._pressed and not self._reader.has_text():
            raise KeyboardInterrupt
        else:
            self._pressed = True
            self._output.note("Ctrl-D or /quit leaves, and so does Ctrl-C pressed again")
        self._reading = False

    def onecmd(self, line: str) -> bool:
        """Execute one line; return whether it was the last. Without a slash, or with a path first, it is a question."""
        line = line.strip()
        if not line:
            return False
        if self._output.interactive and line.lower() in _BARE:
            line = f"/{line.lower()}"
        if not line.startswith("/"):
            self.do_say(line)
            return False
        name, *rest = line[1:].split(maxsplit=1) or [""]
        handler = getattr(self, f"do_{_ALIASES.get(name, name)}", None)
        if handler is None and ("/" in name or (name and os.path.lexists(f"/{name}"))):
            self.do_say(line)
            return False
        if handler is None:
            meant = suggest(name, self.commands(), prefix="/")
            raise UserError(
                f"unknown command /{clean(name)[:40]}: {meant}/help lists the commands, /say TEXT asks a question that "
                "begins with a slash"
            )
        return bool(handler(rest[0] if rest else ""))

    def commands(self) -> list[str]:
        """Return the commands' names, without the slash."""
        return sorted(name.removeprefix("do_") for name in self.get_names() if name.startswith("do_"))

    def do_say(self, text: str) -> None:
        """Ask a question."""
        raise NotImplementedError

    def completions(self, head: str, word: str) -> list[str]:
        """Return the completions of the word after `head`."""
        raise NotImplementedError


def suggest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """Return "did you mean ...? " with the one of `names` that is near, or ""."""
    return "".join(f"did you mean {prefix}{near}? " for near in difflib.get_close_matches(name.lower(), list(names), 1))
