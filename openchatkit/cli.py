"""What every command shares: one-line errors, exit statuses, and numbers checked as they are parsed."""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence

from loguru import logger

from openchatkit import progress
from openchatkit.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit status 2."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., None]:
    """Turn `main(argv) -> status` into a command: a UserError becomes one line on stderr and its exit status."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        # The log is for the person at the terminal: plain lines, above a progress bar if there is one.
        logger.remove()
        logger.add(progress.write, format="{message}", level="INFO")
        try:
            status = main(argv) or 0
            sys.stdout.flush()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            status = error.exit_status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            status = 130
        except BrokenPipeError:
            # The reader of our output has gone; keep the interpreter from complaining when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        sys.exit(status)

    return wrapped


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


def truth(text: str) -> bool:
    """An argparse type for flags the original kit spells `--flag true` or `--flag false`."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def _whole_number(text: str, *, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
    return value
