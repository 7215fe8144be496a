"""The chat shell: what is typed or piped in, and what is printed.

On a terminal it prompts, streams the replies and lives through Ctrl-C. From a pipe it reads one question or command a
line and prints nothing but replies; notes and errors go to stderr in both. A question that got no reply leaves an
empty line there, so that replies stay in step with questions, and makes the exit status 2.
"""

import cmd
import contextlib
from collections.abc import Callable
from typing import TextIO

from openchatkit.errors import USER_ERROR, UserError
from openchatkit.inference.responder import Emit, Reply
from openchatkit.inference.session import Session
from openchatkit.inference.streaming import clean

MAX_LINE = 1 << 20  # characters; far beyond any model's context, and small enough to tokenise in a second or two


class Shell(cmd.Cmd):
    """Reads lines until the end of input or /quit; `status` is the exit status at the end."""

    intro = "Welcome to OpenChatKit shell.   Type /help or /? to list commands.\n"
    prompt = ">>> "

    def __init__(self, session: Session, *, stdin: TextIO, stdout: TextIO, stderr: TextIO, stream: bool = True) -> None:
        super().__init__(stdin=stdin, stdout=stdout)
        self.status = 0
        self._session = session
        self._stderr = stderr
        self._interactive = stdin.isatty()
        self._prompting = stdin.isatty() and stdout.isatty()
        self._stream = stream and stdout.isatty()
        self._passages: list[str] = []
        self._line_number = 0

    # -- the loop

    def cmdloop(self) -> None:
        """Read and obey. Ours, because cmd.Cmd cannot tell the end of input from a line that says EOF."""
        if self._prompting:
            with contextlib.suppress(ImportError):  # line editing, where Python was built with it
                import readline  # noqa: F401
            self._write(self.intro)
        while True:
            try:
                line = self._read_line()
                if line is None or self.onecmd(line):
                    return
            except UserError as error:
                self._complain(error)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._write("\n")
                self._note("Ctrl-D or /quit leaves")

    def onecmd(self, line: str) -> bool:
        """Obey one line; true when it was the last. A line without a slash is said."""
        line = line.strip()
        if not line:
            return False
        if not line.startswith("/"):
            return self.do_say(line)
        name, *rest = line[1:].split(maxsplit=1) or [""]
        handler = getattr(self, f"do_{'help' if name == '?' else name}", None)
        if handler is None:
            names = ", ".join(f"/{name}" for name in self.commands())
            raise UserError(
                f"unknown command /{clean(name)[:40]}: there are {names}; /say TEXT says a text with a slash"
            )
        return bool(handler(rest[0] if rest else ""))

    def commands(self) -> list[str]:
        """The commands' names, without the slash."""
        return sorted(name.removeprefix("do_") for name in self.get_names() if name.startswith("do_"))

    # -- the commands; a docstring is what /help prints

    def do_say(self, text: str) -> bool:
        """/say TEXT  ask; a line without a slash does the same"""
        self._needs(text, "/say")
        passages, self._passages = self._passages, []
        self._answer(lambda emit: self._session.say(text, passages, emit=emit))
        return False

    def do_passage(self, text: str) -> bool:
        """/passage TEXT  give the next question a passage to answer from; several add up"""
        self._needs(text, "/passage")
        self._passages.append(text)
        return False

    def do_raw_say(self, text: str) -> bool:
        """/raw_say TEXT  let the model go on from TEXT as it stands, outside the conversation"""
        self._needs(text, "/raw_say")
        self._answer(lambda emit: self._session.complete(text, emit=emit))
        return False

    def do_raw_prompt(self, text: str) -> bool:
        """/raw_prompt [TEXT]  print the conversation as the model reads it, or as it would if TEXT were said next"""
        self._write(clean(self._session.prompt(text, self._passages)).rstrip("\n") + "\n")
        return False

    def do_reset(self, _: str) -> bool:
        """/reset  forget the conversation"""
        self._passages = []
        self._session.reset()
        return False

    def do_hyperparameters(self, _: str) -> bool:
        """/hyperparameters  print the settings in use"""
        settings = self._session.hyperparameters()
        self._write("Hyperparameters:\n" + "".join(f"  {name}: {value}\n" for name, value in settings.items()))
        return False

    def do_quit(self, _: str) -> bool:
        """/quit  leave; so does Ctrl-D"""
        return True

    def do_help(self, _: str) -> bool:
        """/help  print this list; so does /?"""
        uses = [getattr(self, f"do_{name}").__doc__.split("  ", 1) for name in self.commands()]
        width = max(len(use) for use, _ in uses)
        self._write("".join(f"{use:{width}}  {meaning}\n" for use, meaning in uses))
        return False

    # -- reading and writing

    def _read_line(self) -> str | None:
        """The next line, or None at the end of input."""
        self._line_number += 1
        if self._prompting:
            try:
                line = input(self.prompt)
            except EOFError:
                self._write("\n")
                return None
        else:
            line = self.stdin.readline(MAX_LINE + 1)
            if not line:
                return None
            if len(line) > MAX_LINE and not line.endswith("\n"):
                self._skip_line()
        if len(line) > MAX_LINE:
            self._gap()
            raise UserError(
                f"line {self._line_number} of the input is too long: expected at most {MAX_LINE} characters"
            )
        return self._mended(line.removeprefix("\ufeff") if self._line_number == 1 else line)

    def _skip_line(self) -> None:
        while (rest := self.stdin.readline(MAX_LINE)) and not rest.endswith("\n"):
            pass

    def _mended(self, line: str) -> str:
        """`line` with the bytes that are no UTF-8, which arrive as lone surrogates, replaced."""
        mended = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if mended != line:
            self._note(f"line {self._line_number} of the input is not all UTF-8; what is not was replaced by \ufffd")
        return mended

    def _answer(self, ask: Callable[[Emit], Reply]) -> None:
        shown = False

        def show(text: str) -> None:
            nonlocal shown
            shown = True
            self._write(text)

        try:
            reply = ask(show if self._stream else lambda text: None)
        except UserError:
            if shown:
                self._write("\n")
            self._gap()
            raise
        if reply.finish == "interrupted" and not self._interactive:
            raise KeyboardInterrupt
        self._write("\n" if self._stream else f"{reply.text}\n")
        if reply.dropped:
            turns = "turn was" if reply.dropped == 1 else f"{reply.dropped} turns were"
            self._note(f"the oldest {turns} forgotten to make room")
        if reply.finish == "length":
            self._note(f"the reply was cut after {self._session.sampling.max_tokens} tokens (--max-tokens)")

    def _needs(self, text: str, command: str) -> None:
        if not text:
            raise UserError(f"{command} needs a text behind it")

    def _gap(self) -> None:
        """In a pipe, the empty line that stands for a reply that did not come."""
        if not self._interactive:
            self._write("\n")

    def _write(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()

    def _note(self, text: str) -> None:
        print(f"note: {text}", file=self._stderr, flush=True)

    def _complain(self, error: UserError) -> None:
        print(f"error: {' '.join(str(error).split())}", file=self._stderr, flush=True)
        if not self._interactive:
            self.status = USER_ERROR
