"""A forecast of how long a run will take, from its first steps: one line, and only for a run that takes minutes."""

import time
from collections.abc import Callable

# The first of them is not timed: it also allocates memory and starts threads.
MEASURED_STEPS = 20
SHORTEST_SECONDS = 180


class Forecast:
    """Times the first `MEASURED_STEPS` steps of a run after its start or resume; `clock` is monotonic, in seconds."""

    def __init__(self, total_steps: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._steps = 0
        self._started = 0.0

    def after(self, step: int) -> str | None:
        """Count step `step`, numbered from 1, as done; returns the line when it is due, else None."""
        self._steps += 1
        if self._steps == 1:
            self._started = self._clock()
        if self._steps != MEASURED_STEPS:
            return None
        seconds_per_step = (self._clock() - self._started) / (MEASURED_STEPS - 1)
        steps_left = self._total_steps - step
        if steps_left * seconds_per_step < SHORTEST_SECONDS:
            return None
        return (
            f"{_format_duration(steps_left * seconds_per_step)} to go for {steps_left:,} steps "
            f"at {seconds_per_step:.2g} s a step; Ctrl-C stops after saving, the same command goes on"
        )


def _format_duration(seconds: float) -> str:
    """Return `about 42 minutes`, from two hours on `about 2 h 15 min`."""
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"about {minutes} minutes"
    return f"about {minutes // 60} h {minutes % 60} min"
