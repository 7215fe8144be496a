"""Errors that another try may not meet, and how long a download keeps trying."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from loguru import logger

from openchatkit.errors import Interrupted, UserError

_T = TypeVar("_T")


class TransientError(Exception):
    """A failure that another try may not meet; `wait` is the number of seconds that the server asks to wait, if any."""

    def __init__(self, reason: str, *, wait: float | None = None, restart: bool = False, unreachable: bool = False):
        super().__init__(reason)
        self.wait = wait
        self.restart = restart  # the bytes received so far are of no use
        self.unreachable = unreachable  # no server answered


@dataclass(frozen=True)
class RetryPolicy:
    """At most `tries` in a row that bring no new byte, with delays that double from `base` to `max_delay` seconds."""

    tries: int = 8
    base: float = 1.0
    max_delay: float = 60.0
    max_asked: float = 600.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def backoff(self, error: TransientError, failures: int, what: str, *, reached: bool) -> None:
        """Wait before the next try, or give up; `failures` counts this one, `reached` says that a server has answered.

        UserError when the server cannot be reached at all, Interrupted when it keeps failing.
        """
        if error.unreachable and not reached and failures > 1:
            raise UserError(f"{what}: {error}: check the address and the connection, then run again") from error
        if failures >= self.tries or (error.wait or 0) > self.max_asked:
            asked = f", and asks to wait {error.wait:.0f} seconds" if error.wait else ""
            raise Interrupted(f"{what}: {error}{asked}: run again later, it goes on from there") from error
        seconds = min(self.max_delay, self.base * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
        seconds = max(seconds, error.wait or 0)
        logger.info("{}: {}; trying again in {:.1f} s", what, error, seconds)
        self.sleep(seconds)

    def call(self, ask: Callable[[], _T], what: str) -> _T:
        """Return what `ask` returns, and ask again while it raises TransientError."""
        failures = 0
        while True:
            try:
                return ask()
            except TransientError as error:
                failures += 1
                self.backoff(error, failures, what, reached=False)
