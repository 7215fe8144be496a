"""`training/forecast.py`: how long a run will take, by a clock that the test moves."""

import pytest
from loguru import logger

from openchatkit.training.forecast import MEASURED_STEPS, SHORTEST_SECONDS, Forecast, format_left
from openchatkit.training.sinks import Console


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def forecasts(total_steps: int, *, pace: float, first_step: int = 0, slow_start: float = 0.0) -> list[str]:
    """Return a run's forecasts from `first_step` to its end: `pace` seconds a step, the first `slow_start` longer."""
    clock = Clock()
    forecast = Forecast(total_steps, clock=clock)
    lines = []
    for step in range(first_step + 1, total_steps + 1):
        clock.now += pace + (slow_start if step == first_step + 1 else 0.0)
        forecast.count(step)
        line = forecast.describe()
        assert line is None or step == first_step + MEASURED_STEPS
        lines += [line] if line else []
    return lines


def test_a_long_run_has_one_forecast():
    assert forecasts(1200, pace=2.1, slow_start=30.0) == [
        "about 41 minutes to go for 1,180 steps at 2.1 s a step; Ctrl-C stops after saving, the same command goes on"
    ]


def test_long_times_are_in_hours():
    (line,) = forecasts(3600, pace=2.2625)
    assert line.startswith("about 2 h 15 min to go for 3,580 steps at 2.3 s a step")


@pytest.mark.parametrize(("total_steps", "pace"), [(1200, 0.1), (20, 60.0), (10, 60.0)])
def test_a_short_run_has_no_forecast(total_steps, pace):
    assert forecasts(total_steps, pace=pace) == []


def test_a_resumed_run_counts_the_steps_left():
    (line,) = forecasts(1200, pace=2.0, first_step=1000)
    assert line.startswith("about 6 minutes to go for 180 steps at 2 s a step")


def test_time_left_counts_what_lies_between_steps():
    clock = Clock()
    forecast = Forecast(100, clock=clock)
    assert forecast.seconds_left is None
    for step in (41, 42, 43):
        clock.now += 5.0
        forecast.count(step)
    clock.now += 60.0  # a checkpoint
    forecast.count(44)
    assert forecast.seconds_left == pytest.approx(56 * (5 + 5 + 60) / 3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.6, "0:07"), (2530, "42:10"), (3600, "1:00:00"), (8105, "2:15:05"), (273600, "3 d 4 h")],
)
def test_time_left_is_short(seconds, text):
    assert format_left(seconds) == text


def test_the_console_logs_the_forecast():
    clock = Clock()
    console = Console(first_step=0, total_steps=500, clock=clock)
    printed: list[str] = []
    sink = logger.add(lambda message: printed.append(message.record["message"]))
    try:
        for step in range(1, MEASURED_STEPS + 5):
            clock.now += 6.0
            row = {"step": step, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0, "seconds": 6.0}
            console.add_step({**row, "trained_tokens": 8})
    finally:
        logger.remove(sink)
        console.close()
    assert [line for line in printed if "to go for" in line] == [
        "about 48 minutes to go for 480 steps at 6 s a step; Ctrl-C stops after saving, the same command goes on"
    ]
    assert SHORTEST_SECONDS < 48 * 60
