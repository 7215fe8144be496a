"""Parts that every command shares: one-line errors, exit statuses, and argparse types that check their values."""

import argparse
import contextlib
import functools
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO, Any, NoReturn

from openchatkit.errors import UserError
from openchatkit.libraries import versions
from openchatkit.texts import parse_bool

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells count it


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit status 2."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., None]:
    """Turn `main(argv) -> status` into a command: a UserError becomes one line on stderr and its exit status."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        _open_standard_streams()
        try:
            with _note_interrupts() as interrupts:
                _log_to_the_terminal()
                versions.check_supported()
                status = _call(main, argv, interrupts)
                sys.stdout.flush()
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            status = error.exit_status
        except KeyboardInterrupt:
            # A second Ctrl-C, while threads and memory are being released, ends the process at once.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            print("interrupted", file=sys.stderr, flush=True)
            status = INTERRUPTED
        except BrokenPipeError:
            # The reader of our output has closed it; keep the interpreter from complaining when it flushes at exit.
            discard_output(sys.stdout)
            status = 0
        sys.exit(status)

    return wrapped


def _open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the command was started without.

    Otherwise the next opened file would take its number, and receive the output meant for it. A missing input stays
    None, since some commands need one. Characters that an output's encoding lacks are written as escapes.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - it lasts as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(error: BaseException | str) -> str:
    """Return an error's message on one line, with escapes for characters that control a terminal or cannot be shown."""
    text = " ".join(str(error).split())
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def discard_output(stream: IO[str]) -> None:
    """Discard the buffer of a stream that cannot be written: it would fail again when the stream is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _whole_number(text, minimum=1)


def natural(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _whole_number(text, minimum=0)


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = non_negative_float(text)
    if not value:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def below_one(text: str) -> float:
    """An argparse type: a number of at least 0 and below 1."""
    value = non_negative_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0 and below 1, got {text!r}")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = non_negative_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def positive_share(text: str) -> float:
    """An argparse type: a number above 0, and at most 1."""
    value = share(text)
    if not value:
        raise argparse.ArgumentTypeError(f"expected a share above 0, got {text!r}")
    return value


def text(given: str) -> str:
    """An argparse type: any text that is UTF-8, since tokenizers take no other."""
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"expected UTF-8, character {error.start + 1} is not") from error
    return given


def truth(text: str) -> bool:
    """An argparse type for flags of the original kit of the form `--flag true` or `--flag false`."""
    value = parse_bool(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return value


class RefuseSecret(argparse.Action):
    """A flag for a secret, refused with a message that says what to do instead (`const`), never the secret."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        flags = "/".join(self.option_strings)
        raise UserError(f"{flags} is not taken, since other users see command lines: {self.const}")


def _whole_number(text: str, *, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
    return value


def _call(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None, interrupts: list[int]) -> int:
    try:
        return main(argv) or 0
    except UserError:
        raise
    except Exception as error:
        if interrupts:
            raise KeyboardInterrupt from error
        raise


@contextlib.contextmanager
def _note_interrupts() -> Iterator[list[int]]:
    """Note Ctrl-C besides raising KeyboardInterrupt, which some libraries swallow as they are imported, to fail later.

    A command that continues after Ctrl-C restores Python's own handler, since later errors have other causes.
    """
    interrupts: list[int] = []

    def note(number: int, _: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _log_to_the_terminal() -> None:
    """Log plain lines for a person at a terminal, above the progress bar if there is one."""
    from loguru import logger

    from openchatkit import progress

    logger.remove()
    logger.add(progress.write, format="{message}", level="INFO")


def _print_interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


# The one side effect of an import in this library. Only commands import this module, before all others: without it,
# Ctrl-C during their further imports would print a traceback.
sys.excepthook = _print_interrupted
