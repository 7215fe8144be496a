"""How long a run will take, said once, early, by its first steps; and only of a run that takes minutes."""

import time
from collections.abc import Callable

# The first step is left out of the measure: it also allocates memory and starts threads.
MEASURED_STEPS = 20
WORTH_SAYING_SECONDS = 180


class Forecast:
    """Watches the clock for a run's first `MEASURED_STEPS` steps after its start or resume.

    `clock` returns seconds and never runs backwards.
    """

    def __init__(self, total_steps: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._seen = 0
        self._began = 0.0

    def after(self, step: int) -> str | None:
        """Take note that step `step`, counted from 1, is done; returns the one line when it is due, else None."""
        self._seen += 1
        if self._seen == 1:
            self._began = self._clock()
        if self._seen != MEASURED_STEPS:
            return None
        pace = (self._clock() - self._began) / (MEASURED_STEPS - 1)
        left = self._total_steps - step
        if left * pace < WORTH_SAYING_SECONDS:
            return None
        return (
            f"{_duration(left * pace)} to go for {left:,} steps at {pace:.2g} s a step; "
            "Ctrl-C stops after saving, the same command goes on"
        )


def _duration(seconds: float) -> str:
    """`about 42 minutes`, and from two hours on `about 2 h 15 min`."""
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"about {minutes} minutes"
    return f"about {minutes // 60} h {minutes % 60} min"
