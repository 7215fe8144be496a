"""Losses that jump: far above those of the steps before, by a measure that a few odd steps do not move.

A loss is compared with the median of the last steps, in units of their median absolute deviation, which for normal
numbers is 0.6745 standard deviations (Leys et al., Journal of Experimental Social Psychology 49, 2013). Only losses
count that are in metrics.jsonl, so that a resumed run marks the same steps as one that was never stopped.
"""

import statistics
from collections import deque
from collections.abc import Iterable

from openchatkit.training.curve_names import Row

WINDOW = 50  # steps that a loss is compared with
LEAST = 20  # of these, before which nothing is a jump: losses fall fast at the start
_DEVIATIONS = 8.0  # standard deviations above the median
_SHARE = 0.1  # of the median, and at least so much above it: where a loss hardly varies, little is many deviations
_OF_NORMAL = 0.6745


class JumpFinder:
    """Marks the rows of steps whose loss jumps; `rows` are those of the steps before, as metrics.jsonl has them."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._losses = deque[float](maxlen=WINDOW)
        for row in rows:
            self._add(row)

    def mark(self, row: Row, samples: range) -> Row:
        """Return the row of a step, with `jump` if its loss is one: the usual loss, the step's first and last sample.

        A loss that is not finite, null in the row, is a jump wherever one can be.
        """
        usual = self._find_usual(row["loss"]) if row["trained_tokens"] else None
        self._add(row)
        if usual is None:
            return row
        return {**row, "jump": {"usual_loss": usual, "first_sample": samples[0], "last_sample": samples[-1]}}

    def _add(self, row: Row) -> None:
        if row.get("loss") is not None:
            self._losses.append(row["loss"])

    def _find_usual(self, loss: float | None) -> float | None:
        """Return the median of the losses before if this one jumps."""
        if len(self._losses) < LEAST:
            return None
        usual = statistics.median(self._losses)
        deviation = statistics.median(abs(each - usual) for each in self._losses) / _OF_NORMAL
        limit = usual + max(_DEVIATIONS * deviation, _SHARE * usual)
        return usual if loss is None or loss > limit else None
