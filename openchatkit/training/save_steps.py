"""The steps after which a run is saved, besides the last one."""

import argparse
from collections.abc import Collection
from dataclasses import dataclass

from openchatkit.cli import positive_float, positive_int


@dataclass(frozen=True)
class SaveSteps:
    """Every `every` steps (0: never), those that are whole parts of powers of `growth`, and those of `extra`."""

    every: int = 0
    growth: float | None = None
    extra: Collection[int] = ()

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after so many steps of the run."""
        return bool(self.every and step % self.every == 0) or step in self.extra or self._is_power(step)

    def count(self, first: int, last: int) -> int:
        """Return after how many of the steps `first` to `last`, that one included, a checkpoint is due."""
        due = set(range(-(-first // self.every) * self.every, last + 1, self.every)) if self.every else set()
        due |= {step for step in self.extra if first <= step <= last}
        power = 1.0
        while self.growth is not None and int(power) <= last:
            due |= {int(power)} if int(power) >= first else set()
            power *= self.growth
        return len(due)

    def _is_power(self, step: int) -> bool:
        if self.growth is None:
            return False
        power = 1.0
        while int(power) < step:
            power *= self.growth
        return int(power) == step


def parse_growth(text: str) -> float:
    """Return `--checkpoint-growth`: above 1, or its powers would not grow, and not so little that they hardly do."""
    value = positive_float(text)
    if value < 1.001:
        raise argparse.ArgumentTypeError(f"expected at least 1.001, got {text!r}")
    return value


def parse_steps(text: str) -> str:
    """Return `--extra-save-steps`, each step once and in order, joined by commas."""
    return ",".join(map(str, sorted({positive_int(step) for step in text.split(",")})))
