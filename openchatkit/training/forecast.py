"""A forecast of how long a run will take, from its steps so far, and one line of it for a run that takes minutes."""

import time
from collections.abc import Callable

# The first of them is not timed: it also allocates memory and starts threads.
MEASURED_STEPS = 20
SHORTEST_SECONDS = 180


class Forecast:
    """Times the steps of a run after its start or resume; `clock` is monotonic, in seconds.

    Evaluations and checkpoints between them count as part of them.
    """

    def __init__(self, total_steps: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._step = self._steps = 0
        self._started = self._last = 0.0

    def count(self, step: int) -> None:
        """Count step `step`, numbered from 1, as done."""
        self._step = step
        self._steps += 1
        self._last = self._clock()
        if self._steps == 1:
            self._started = self._last

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the run; None until two steps are done."""
        if self._steps < 2:
            return None
        return (self._total_steps - self._step) * self._seconds_per_step

    @property
    def _seconds_per_step(self) -> float:
        return (self._last - self._started) / (self._steps - 1)

    def describe(self) -> str | None:
        """Return the line after the first `MEASURED_STEPS` steps of a run that has minutes to go, else None."""
        left = self.seconds_left
        if self._steps != MEASURED_STEPS or left is None or left < SHORTEST_SECONDS:
            return None
        return (
            f"{_format_long(left)} to go for {self._total_steps - self._step:,} steps "
            f"at {self._seconds_per_step:.2g} s a step; Ctrl-C stops after saving, the same command goes on"
        )


def format_left(seconds: float) -> str:
    """Return a time as `0:07`, `42:10`, `2:15:00` or `3 d 4 h`."""
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes = f"{whole // 60 % 60}:{whole % 60:02}" if whole < 3600 else f"{whole // 60 % 60:02}:{whole % 60:02}"
    return minutes if whole < 3600 else f"{whole // 3600}:{minutes}"


def _format_long(seconds: float) -> str:
    """Return `about 42 minutes`, from two hours on `about 2 h 15 min`."""
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"about {minutes} minutes"
    return f"about {minutes // 60} h {minutes % 60} min"
