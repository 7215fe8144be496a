"""What the chat prints: replies to stdout, notes and errors to stderr, and what each becomes in a pipe or as JSON."""

from collections.abc import Callable
from typing import TextIO

from openchatkit import cli
from openchatkit.errors import USER_ERROR, UserError
from openchatkit.inference import report
from openchatkit.inference.responder import Emit, Reply
from openchatkit.inference.shell.style import Style
from openchatkit.inference.shell.wrapping import Wrapper, columns_of

# What Ctrl-C leaves of a question: with some text of its reply, and without.
INTERRUPTED = ("what came is kept, /undo takes it back", "the question was not kept")


class Unwritable(UserError):
    """Standard output takes no more: there is nobody to go on for."""


class Output:
    """The two streams. `interactive`: a person types and sees errors, which then do not count in `status`.

    Replies are streamed only to a terminal, and only there wrapped, and followed by their sources. With `as_json` every
    reply is an object on a line of its own, and whatever else commands print goes to stderr.
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
        """Print on stdout at once. Raises BrokenPipeError when its reader has gone, Unwritable for other failures."""
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            cli.give_up(self._stdout)
            raise Unwritable(f"standard output cannot be written: {error.strerror}") from error

    def show(self, text: str) -> None:
        """Print what a command was asked to print."""
        if self._json:
            print(text, end="", file=self._stderr, flush=True)
        else:
            self.write(text)

    def note(self, text: str) -> None:
        """Say something on stderr that whoever reads a log should know too."""
        self._say(self._style.dim(f"note: {cli.one_line(text)}"))

    def tell(self, text: str) -> None:
        """Confirm something to a person; a pipe needs no confirmation."""
        if self.interactive:
            self._say(self._style.dim(cli.one_line(text)))

    def complain(self, error: UserError) -> None:
        """Print an error on one line, for who types as they can mend it; in a pipe the exit status will be 2."""
        said = error.typed if self.interactive else error
        self._say(self._style.red("error:") + f" {cli.one_line(said)}")
        if not self.interactive:
            self.status = USER_ERROR

    def gap(self, question: str, error: Exception) -> None:
        """What stands in a pipe for a reply that did not come, so that the n-th reply stays the n-th question's."""
        if self._json:
            self.write(report.to_json(report.as_error(question, error)))
        elif not self.interactive:
            self.write("\n")

    def answer(
        self,
        question: str,
        ask: Callable[[Emit], Reply],
        *,
        max_tokens: int,
        interrupted: tuple[str, str] = INTERRUPTED,
    ) -> None:
        """Print the reply that `ask` makes, as it comes where it is streamed, and the notes that belong to it.

        Ctrl-C ends the reply, and `interrupted` says what that leaves; where nobody types, it then ends all. Raises
        what `ask` does.
        """
        shown = 0
        wrapper = Wrapper(columns_of(self._stdout) if self._stdout.isatty() else None)

        def show(text: str) -> None:
            nonlocal shown
            shown += len(text)
            self.write(wrapper.push(text))

        try:
            reply = ask(show if self._stream else lambda text: None)
        except UserError as error:
            if shown:
                self.write(f"{wrapper.flush()}\n")
            self.gap(question, error)
            raise
        if self._stream:
            self.write(f"{wrapper.push(reply.text[shown:])}{wrapper.flush()}\n")
        if reply.finish == "interrupted" and not self.interactive:
            raise KeyboardInterrupt
        if self._json:
            self.write(report.to_json(report.as_object(question, reply)))
        elif not self._stream:
            self.write(f"{wrapper.push(reply.text)}{wrapper.flush()}\n")
        self._notes(reply, max_tokens, interrupted)

    def _notes(self, reply: Reply, max_tokens: int, interrupted: tuple[str, str]) -> None:
        if self._cites and reply.sources:
            for number, source in enumerate(reply.sources, 1):
                if source.source:
                    self._say(self._style.dim(report.citation(number, source)))
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
            self._say(self._style.dim(report.figures(reply.statistics)))

    def _say(self, text: str) -> None:
        print(text, file=self._stderr, flush=True)
