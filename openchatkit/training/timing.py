"""Spans of a step on this rank: what it computed, sent or waited for, for which micro-batch, and when.

On a CPU a span lies between two readings of the clock. A GPU works after the host has asked it to, so there it lies
between two events of the stream that passes run on, which are read when the device has passed them.
"""

import contextlib
import time
from collections.abc import Iterator

import torch

from openchatkit.distributed.activity import Activity
from openchatkit.formats.trace import TraceSpan

FORWARD, LOSS, BACKWARD = "Forward", "Loss", "Backward"
# The halves of a split backward: gradients of a stage's input, and of its weights.
BACKWARD_INPUT, BACKWARD_WEIGHT = "Backward input", "Backward weight"
RECEIVE_FORWARD, RECEIVE_BACKWARD = "Receive forward", "Receive backward"
SEND_FORWARD, SEND_BACKWARD = "Send forward", "Send backward"
# Of a step as a whole: its rows, the sum of gradients over ranks, their norm, and the optimizer.
DATA, REDUCE, NORM, UPDATE = "Data", "Sum gradients", "Norm", "Update"

RECEIVES, SENDS = (RECEIVE_FORWARD, RECEIVE_BACKWARD), (SEND_FORWARD, SEND_BACKWARD)
_PASSES = {"forward": FORWARD, "backward": BACKWARD, "input": BACKWARD_INPUT, "weight": BACKWARD_WEIGHT}

Mark = float | torch.cuda.Event


class StepTimer:
    """Notes the spans of one step after another.

    A receive lasts from the end of what the rank did before until the pass that needed it could begin: the time that
    the rank had nothing else to do. A send is the moment at which the message was handed over, and has no length.
    What runs is also noted in `activity`, for the watchdog.
    """

    def __init__(self, device: torch.device, activity: Activity | None = None) -> None:
        self._activity = activity or Activity()
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, Mark, Mark, int | None, int | None]] = []
        self._pending: set[tuple[str, int | None, int]] = set()
        self._last: Mark = 0.0
        self._first_micro_batch = 0
        self._anchor: tuple[float, Mark] | None = None

    def start_step(self) -> None:
        """Forget the spans of the step before."""
        self._spans.clear()
        self._pending.clear()
        self._first_micro_batch = 0

    def end_batch(self, micro_batches: int) -> None:
        """Count the micro-batches of a batch that is done, so that those of the next have other numbers."""
        self._first_micro_batch += micro_batches

    def compare_clocks(self) -> None:
        """Wait for a GPU and note where its clock stands, which `spans` of the steps that follow need."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            self._anchor = time.perf_counter(), self._mark()

    @contextlib.contextmanager
    def compute(self, kind: str, stage: int | None = None, micro_batch: int = 0) -> Iterator[None]:
        """Note what runs inside; it belongs to no micro-batch where `stage` is None."""
        number = None if stage is None else self._first_micro_batch + micro_batch
        start = self._mark()
        receive = RECEIVE_FORWARD if kind == FORWARD else RECEIVE_BACKWARD
        if number is not None and (receive, stage, number) in self._pending:
            self._pending.remove((receive, stage, number))
            self._spans.append((receive, self._last, start, stage, number))
        try:
            with self._activity.doing(kind.lower(), stage=stage, micro_batch=number):
                yield
        finally:
            self._last = self._mark()
            self._spans.append((kind, start, self._last, stage, number))

    @contextlib.contextmanager
    def on_host(self, kind: str) -> Iterator[None]:
        """Note what the host does inside, whatever its device is doing."""
        start = time.perf_counter()
        try:
            with self._activity.doing(kind.lower()):
                yield
        finally:
            self._spans.append((kind, start, time.perf_counter(), None, None))

    def during_pass(self, kind: str, stage: int, micro_batch: int) -> contextlib.AbstractContextManager[None]:
        """Note a pass of a pipeline's stage; see `StageObserver`."""
        return self.compute(_PASSES[kind], stage, micro_batch)

    def at_receive(self, stage: int, micro_batch: int, *, backward: bool) -> None:
        """Note that a message is asked for, which the next pass of this stage and micro-batch waits for."""
        self._last = self._mark()
        self._pending.add((RECEIVES[backward], stage, self._first_micro_batch + micro_batch))

    def at_send(self, stage: int, micro_batch: int, *, backward: bool) -> None:
        """Note that a message is handed over."""
        self._last = self._mark()
        self._spans.append((SENDS[backward], self._last, self._last, stage, self._first_micro_batch + micro_batch))

    def seconds(self, *kinds: str) -> float:
        """Return the length of the step's spans of some kinds; the device must be done with them."""
        return sum(_measure(start, end) for kind, start, end, _, _ in self._spans if kind in kinds)

    def spans(self, step: int) -> list[TraceSpan]:
        """Return the spans of the step that was taken last, in the order of their ends, by `time.perf_counter`."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return [
            TraceSpan(kind, step, self._place(start), self._place(end), stage, number, on_host=kind == DATA)
            for kind, start, end, stage, number in self._spans
        ]

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _place(self, mark: Mark) -> float:
        """Return where a mark lies on the host's clock."""
        if isinstance(mark, float):
            return mark
        assert self._anchor is not None, "the clocks were not compared"
        seconds, event = self._anchor
        return seconds + _measure(event, mark)


def _measure(start: Mark, end: Mark) -> float:
    """Return the seconds between two marks of one kind."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    return float(start.elapsed_time(end)) / 1000
