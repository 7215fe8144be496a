"""Output of the chat: replies to stdout, notes and errors to stderr, and their forms in a pipe or as JSON."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

from openchatkit import cli
from openchatkit.errors import USER_ERROR, UserError
from openchatkit.inference import report
from openchatkit.inference.responder import Reply
from openchatkit.inference.shell.terminal import Style, columns_of
from openchatkit.inference.shell.wrapping import LineWrapper

# What a question leaves after Ctrl-C: with some text of its reply, and without.
INTERRUPTED = ("the text so far is kept, /undo takes it back", "the question was not kept")


class Unwritable(UserError):
    """Standard output cannot be written any more, so the chat ends."""


class ReplyPrinter:
    """A reply being printed: `emit` prints its text as it comes, `length` characters so far; `reply` is set last."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.reply: Reply | None = None
        self.length = 0
        self._write = write

    def emit(self, text: str) -> None:
        """Print the next piece of the reply."""
        self.length += len(text)
        self._write(text)


class Output:
    """The two streams. `interactive`: a person types and sees errors, which then do not change `status`.

    Only on a terminal are replies streamed, wrapped, and followed by their sources. With `as_json` every reply is an
    object on a line of its own, and all other output of commands goes to stderr.
    """

    def __init__(
        self,
        stdout: TextIO,
        stderr: TextIO,
        *,
        interactive: bool,
        stream: bool = True,
        as_json: bool = False,
        verbose: bool = False,
        citations: bool = True,
    ) -> None:
        self.status = 0
        self.verbose = verbose
        self.interactive = interactive
        self._stdout = stdout
        self._stderr = stderr
        self._style = Style(stderr)
        self._json = as_json
        self._cites = citations and stdout.isatty() and not as_json
        self._stream = stream and stdout.isatty() and not as_json

    def write(self, text: str) -> None:
        """Print on stdout at once. Raises BrokenPipeError when its reader has gone, Unwritable for other errors."""
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            cli.discard_output(self._stdout)
            raise Unwritable(f"standard output cannot be written: {error.strerror}") from error

    def show(self, text: str) -> None:
        """Print the result of a command."""
        if self._json:
            print(text, end="", file=self._stderr, flush=True)
        else:
            self.write(text)

    def note(self, text: str) -> None:
        """Print a note on stderr, in a pipe too, for readers of a log."""
        self._print(self._style.dim(f"note: {cli.one_line(text)}"))

    def confirm(self, text: str) -> None:
        """Confirm a command to a person; a pipe needs no confirmation."""
        if self.interactive:
            self._print(self._style.dim(cli.one_line(text)))

    def report_error(self, error: UserError) -> None:
        """Print an error on one line, for a person with what to type instead; in a pipe the exit status becomes 2."""
        message = error.typed if self.interactive else error
        self._print(self._style.red("error:") + f" {cli.one_line(message)}")
        if not self.interactive:
            self.status = USER_ERROR

    def skip_reply(self, question: str, error: Exception) -> None:
        """Write an empty line, or an error as JSON, into a pipe: the n-th reply stays that of the n-th question."""
        if self._json:
            self.write(report.to_json(report.as_error(question, error)))
        elif not self.interactive:
            self.write("\n")

    @contextlib.contextmanager
    def replying(
        self, question: str, *, max_tokens: int, interrupted: tuple[str, str] = INTERRUPTED
    ) -> Iterator[ReplyPrinter]:
        """Print the reply that is made in a `with` block, as it comes where it is streamed, and then its notes.

        Ctrl-C ends the reply, and `interrupted` says what remains; where nobody types, it ends the chat too. After an
        error in the block, the reply is skipped.
        """
        wrapper = LineWrapper(columns_of(self._stdout) if self._stdout.isatty() else None)
        printer = ReplyPrinter(lambda text: self.write(wrapper.push(text)) if self._stream else None)
        try:
            yield printer
        except UserError as error:
            if self._stream and printer.length:
                self.write(f"{wrapper.flush()}\n")
            self.skip_reply(question, error)
            raise
        reply = printer.reply
        assert reply is not None, "no reply was made"
        if self._stream:
            self.write(f"{wrapper.push(reply.text[printer.length :])}{wrapper.flush()}\n")
        if reply.finish == "interrupted" and not self.interactive:
            raise KeyboardInterrupt
        if self._json:
            self.write(report.to_json(report.as_object(question, reply)))
        elif not self._stream:
            self.write(f"{wrapper.push(reply.text)}{wrapper.flush()}\n")
        self._print_notes(reply, max_tokens, interrupted)

    def _print_notes(self, reply: Reply, max_tokens: int, interrupted: tuple[str, str]) -> None:
        if self._cites and reply.sources:
            for number, source in enumerate(reply.sources, 1):
                if source.source:
                    self._print(self._style.dim(report.citation(number, source)))
        if reply.note:
            self.note(reply.note)
        if reply.dropped:
            turns = "turn was" if reply.dropped == 1 else f"{reply.dropped} turns were"
            self.note(f"the oldest {turns} left out to make room")
        if reply.finish == "length" and len(reply.tokens) < max_tokens:
            self.note("the reply was cut: it reached the end of what the model reads at once")
        elif reply.finish == "length":
            how = "/set max_tokens" if self.interactive else "--max-tokens"
            self.note(f"the reply was cut after {report.count(max_tokens, 'token')} ({how})")
        if reply.finish == "interrupted":
            self.note(f"interrupted: {interrupted[0] if reply.text else interrupted[1]}")
        if reply.verdict and reply.verdict.allowed and reply.verdict.message:
            self.note(reply.verdict.message)
        if self.verbose:
            self._print(self._style.dim(report.figures(reply.statistics)))

    def _print(self, text: str) -> None:
        print(text, file=self._stderr, flush=True)
