"""`--profiling`: the spans of some steps, of every rank and of all ranks on one clock; or torch's own profiler.

Merging is done by all ranks together, after the last of the steps that are recorded.
"""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from openchatkit.distributed.layout import Layout
from openchatkit.formats import trace
from openchatkit.formats.trace import RankTrace
from openchatkit.storage import storage_errors
from openchatkit.training import device
from openchatkit.training.config import Settings
from openchatkit.training.timing import StepTimer

SKIPPED_STEPS, RECORDED_STEPS = 2, 3

# Of which the fastest tells the difference of two clocks best: an answer's way is then no longer than the question's.
_ROUNDS = 16


class Profile(Protocol):
    """A recorder of steps, which is called after each."""

    def step(self) -> None:
        """Take note of a step."""


def open_profile(
    settings: Settings, layout: Layout, timer: StepTimer, *, first_step: int, total_steps: int
) -> "contextlib.AbstractContextManager[Profile | None]":
    """Return the profile that `--profiling` asks for, or a context of None."""
    if settings.profiling == "pytorch_profiling":
        return device.profiler(settings)
    if settings.profiling == "no-profiling":
        return contextlib.nullcontext()
    own = device.TRACES / device.trace_name(settings)
    merged = settings.checkpoint_path / trace.TRACE
    return contextlib.nullcontext(
        TidyTrace(layout, timer, first_step=first_step, total_steps=total_steps, own=own, merged=merged)
    )


class TidyTrace:
    """Records steps after the first ones, which also make buffers; in a run of few, the last ones.

    Each rank writes its spans to `own`, by its own clock, and rank 0 those of all to `merged`, by its clock.
    """

    def __init__(
        self, layout: Layout, timer: StepTimer, *, first_step: int, total_steps: int, own: Path, merged: Path
    ) -> None:
        self._layout, self._timer = layout, timer
        self._own, self._merged = own, merged
        self._step = first_step
        self._first = first_step + min(SKIPPED_STEPS, max(0, total_steps - first_step - RECORDED_STEPS)) + 1
        self._last = min(self._first + RECORDED_STEPS - 1, total_steps)
        self._trace = RankTrace(layout.rank, layout.replica, layout.pipeline_rank, layout.tensor_rank)
        self._prepare_next()

    def step(self) -> None:
        """Record the step that was taken, if it is one of those; after the last of them, write the traces."""
        self._step += 1
        if self._first <= self._step <= self._last:
            self._trace.spans.extend(self._timer.spans(self._step))
        if self._step == self._last:
            self._write()
        self._prepare_next()

    def _prepare_next(self) -> None:
        if self._first <= self._step + 1 <= self._last:
            self._timer.compare_clocks()

    def _write(self) -> None:
        with storage_errors(self._own.parent):
            self._own.parent.mkdir(parents=True, exist_ok=True)
            trace.write(self._own, [self._trace])
        ranks = gather_traces(self._trace, self._layout)
        if ranks is not None:
            with storage_errors(self._merged.parent):
                trace.write(self._merged, ranks)


def gather_traces(own: RankTrace, layout: Layout) -> list[RankTrace] | None:
    """Return the traces of all ranks on rank 0, on its clock; None on the others."""
    if layout.control is None:
        return [own]
    offsets = measure_offsets(layout)
    ranks: list[RankTrace] | None = [own] * layout.world_size if layout.rank == 0 else None
    dist.gather_object(own, ranks, dst=0, group=layout.control)
    if ranks is None or offsets is None:
        return None
    return [_shift(rank, offset) for rank, offset in zip(ranks, offsets, strict=True)]


def measure_offsets(layout: Layout) -> list[float] | None:
    """Return, on rank 0, the seconds to add to each rank's `time.perf_counter` to have its own; None on the others.

    Rank 0 asks one rank after the other what time it is there, and takes the answer for that of half the time between
    question and answer, as NTP does (RFC 5905, section 8). A difference that may be an error of that counts as none:
    the ranks of a host have one clock.
    """
    message = torch.zeros(1, dtype=torch.float64)
    if layout.rank:
        for _ in range(_ROUNDS):
            dist.recv(message, src=0, group=layout.control)
            message.fill_(time.perf_counter())
            dist.send(message, dst=0, group=layout.control)
        return None
    offsets = [0.0]
    for rank in range(1, layout.world_size):
        answers = []
        for _ in range(_ROUNDS):
            asked = time.perf_counter()
            dist.send(message, dst=rank, group=layout.control)
            dist.recv(message, src=rank, group=layout.control)
            took = time.perf_counter() - asked
            answers.append((took, asked + took / 2 - message.item()))
        took, offset = min(answers)
        offsets.append(offset if abs(offset) > took / 2 else 0.0)
    return offsets


def _shift(rank: RankTrace, seconds: float) -> RankTrace:
    spans = [replace(span, start=span.start + seconds, end=span.end + seconds) for span in rank.spans]
    return replace(rank, spans=spans)
