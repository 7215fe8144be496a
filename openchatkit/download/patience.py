"""What another try may mend, and how long trying goes on."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from loguru import logger

from openchatkit.errors import Interrupted, UserError

_T = TypeVar("_T")


class TransientError(Exception):
    """A failure that another try may not meet: `wait` is the number of seconds the server asks for, if it does."""

    def __init__(self, reason: str, *, wait: float | None = None, anew: bool = False, unreachable: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.anew = anew  # what has come so far is of no use
        self.unreachable = unreachable  # nobody answered at all


@dataclass(frozen=True)
class Patience:
    """How long errors are borne: `tries` in a row that bring no new byte, with waits that double, in seconds."""

    tries: int = 8
    first: float = 1.0
    longest: float = 60.0
    longest_asked: float = 600.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def bear(self, error: TransientError, failures: int, what: str, *, met: bool) -> None:
        """Wait before the next try, or end the trying; `failures` counts this one, `met` says that somebody is there.

        UserError when the server cannot be reached at all, Interrupted when it does not do what it should.
        """
        if error.unreachable and not met and failures > 1:
            raise UserError(f"{what}: {error}: check the address and the connection, then run again") from error
        if failures >= self.tries or (error.wait or 0) > self.longest_asked:
            asked = f", and asks for {error.wait:.0f} seconds of patience" if error.wait else ""
            raise Interrupted(f"{what}: {error}{asked}: run again later, it goes on from there") from error
        seconds = min(self.longest, self.first * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
        seconds = max(seconds, error.wait or 0)
        logger.info("{}: {}; trying again in {:.1f} s", what, error, seconds)
        self.sleep(seconds)

    def until_answered(self, ask: Callable[[], _T], what: str) -> _T:
        """What `ask` returns, asked again while it raises TransientError."""
        failures = 0
        while True:
            try:
                return ask()
            except TransientError as error:
                failures += 1
                self.bear(error, failures, what, met=False)
