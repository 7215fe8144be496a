"""The numbers of a run as pictures need them: curves of few points, and the timeline of one step.

The live page of a run and `tools/plot_training.py` draw the same from here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from openchatkit import web
from openchatkit.errors import UserError
from openchatkit.formats import metrics, trace
from openchatkit.formats.trace import RankTrace

# A curve has at most twice as many points; each is the mean of as many consecutive steps as any other.
POINTS = 500
# Ranks of a pipeline that a timeline has room for.
RANKS = 32

_KEYS = ("loss", "lr", "grad_norm", "tokens_per_second", "hardware_share")


@dataclass
class _Point:
    """The sums of some consecutive steps, and how many of them have a value."""

    step: int
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        self.steps += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def merge(self, other: "_Point") -> None:
        self.step = other.step
        self.steps += other.steps
        for key, total in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + total
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]

    def mean(self, key: str) -> float | None:
        return self.sums[key] / self.counts[key] if key in self.sums else None


class RunCurves:
    """Takes the rows of a run one by one, in memory that does not grow with the number of steps."""

    def __init__(self, name: str, total_steps: int | None = None) -> None:
        self.name, self.total_steps = name, total_steps
        self._points: list[_Point] = []
        self._steps_a_point = 1
        self._evaluations: list[tuple[int, float]] = []
        self._last: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of metrics.jsonl, of a step or of an evaluation."""
        if "loss" not in row:
            if row.get("evaluation_loss") is not None:  # of the data that are evaluated on all along
                self._evaluations.append((row["step"], row["evaluation_loss"]))
            return
        self._last = {key: value for key, value in row.items() if not isinstance(value, dict)}
        if not self._points or self._points[-1].steps == self._steps_a_point:
            self._points.append(_Point(row["step"]))
        self._points[-1].step = row["step"]
        self._points[-1].add({key: row[key] for key in _KEYS if row.get(key) is not None})
        if len(self._points) == 2 * POINTS and self._points[-1].steps == self._steps_a_point:
            self._halve()

    def to_json(self) -> dict[str, Any]:
        """Return the curves: for each key the means, with the last step of each, and null where there is no value."""
        return {
            "name": self.name,
            "total_steps": self.total_steps,
            "steps_a_point": self._steps_a_point,
            "steps": [point.step for point in self._points],
            **{key: [point.mean(key) for point in self._points] for key in _KEYS},
            "evaluation_steps": [step for step, _ in self._evaluations],
            "evaluation_loss": [loss for _, loss in self._evaluations],
            "last": self._last,
        }

    def _halve(self) -> None:
        """Make one point of every two."""
        for first, second in zip(self._points[::2], self._points[1::2], strict=True):
            first.merge(second)
        self._points = self._points[::2]
        self._steps_a_point *= 2


def read_curves(folder: Path) -> RunCurves:
    """Return the curves of the run whose metrics.jsonl is in a folder; UserError without one, or without a step."""
    if not (folder / metrics.METRICS).is_file():
        raise UserError(
            f"{folder} has no {metrics.METRICS}: expected a folder that training wrote, as --checkpoint-path named it"
        )
    try:
        rows = metrics.read(folder)
    except ValueError as error:
        raise UserError(f"{error}: restore it, or resume the run, which leaves such lines out") from error
    curves = RunCurves(folder.resolve().name)
    for row in rows:
        curves.add(row)
    if not curves.to_json()["steps"]:
        raise UserError(f"{folder / metrics.METRICS} has no step yet: wait for the first, or name another run")
    return curves


def read_timeline(path: Path) -> dict[str, Any] | None:
    """Return the timeline of a trace file, None without one; UserError for a file that is no trace."""
    try:
        return make_timeline(trace.read(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{error}: delete it, or record the run again") from error


def make_timeline(ranks: Sequence[RankTrace]) -> dict[str, Any] | None:
    """Return what the ranks of the first pipeline did in the middle one of the recorded steps, in milliseconds.

    Of a tensor group the first rank is shown, and of long pipelines the first `RANKS` ranks. None for empty traces.
    """
    shown = [one for one in ranks if one.replica == one.tensor_rank == 0][:RANKS]
    steps = sorted({span.step for one in shown for span in one.spans})
    if not steps:
        return None
    step = steps[len(steps) // 2]
    spans = [[span for span in one.spans if span.step == step and not span.on_host] for one in shown]
    start = min(span.start for of_rank in spans for span in of_rank)
    end = max(span.end for of_rank in spans for span in of_rank)
    rows = []
    for one, of_rank in zip(shown, spans, strict=True):
        waits = sum(span.end - span.start for span in of_rank if span.kind.startswith(trace.RECEIVE))
        boxes = [
            [span.kind, span.micro_batch, span.stage, (span.start - start) * 1e3, (span.end - start) * 1e3]
            for span in of_rank
            if span.end > span.start and not span.kind.startswith(trace.RECEIVE)
        ]
        rows.append({"rank": one.rank, "waits": waits / (end - start), "boxes": boxes})
    return {"step": step, "milliseconds": (end - start) * 1e3, "rows": rows, "ranks": len(ranks)}


def render_page(data: dict[str, Any] | None) -> str:
    """Return the page of runs, which needs no other file; None makes it ask its server for the data, again and again.

    `data` are `runs`, a list of curves, and a `timeline` or null. Their texts are never taken for markup.
    """
    page = resources.files(__package__).joinpath("run_page.html").read_text(encoding="utf-8")
    # A script ends at the first "</", even within a string.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return page.replace("@POLICY@", web.page_policy(page.encode())).replace("@DATA@", text)
