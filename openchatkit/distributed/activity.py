"""Activity of a rank, as its main thread notes it: step, operation, micro-batch, and whether it waits for others.

Notes cost about a microsecond each and are read by the watchdog's thread (`distributed.watchdog`).
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Position:
    """A point in a run. Steps are counted from 1, stages and micro-batches from 0; `since` is in this rank's
    `time.monotonic()` seconds. `waits`: nothing remains to be done here but to wait for other ranks.
    """

    operation: str
    step: int | None = None
    micro_batch: int | None = None
    stage: int | None = None
    waits: bool = False
    since: float = field(default_factory=time.monotonic)

    def describe(self) -> str:
        """Return it in words, such as `step 17 (forward, stage 1, micro-batch 3)`."""
        parts = [] if self.operation == "step" else [self.operation]
        if self.stage is not None:
            parts.append(f"stage {self.stage}")
        if self.micro_batch is not None:
            parts.append(f"micro-batch {self.micro_batch}")
        if self.waits:
            parts.append("waiting for others")
        if self.step is None:
            return ", ".join(parts)
        return f"step {self.step} ({', '.join(parts)})" if parts else f"step {self.step}"

    def to_json(self, now: float) -> dict[str, Any]:
        """Return it for another rank, whose clock differs: `since` becomes an age in seconds."""
        return dataclasses.asdict(self) | {"since": now - self.since}

    @classmethod
    def from_json(cls, values: dict[str, Any], now: float) -> "Position":
        return cls(**values | {"since": now - values["since"]})


class Activity:
    """The present position of a rank. Written by its main thread alone; `now` is replaced as a whole."""

    def __init__(self) -> None:
        self.now = Position("start")

    def begin(self, operation: str, *, step: int | None = None) -> None:
        """Note what this rank is at from now on, in a new step if given; `doing` notes parts of it."""
        self.now = Position(operation, self.now.step if step is None else step)

    @contextlib.contextmanager
    def doing(self, operation: str, *, micro_batch: int | None = None, stage: int | None = None) -> Iterator[None]:
        """Note an operation that this rank does by itself, until the block ends.

        After an exception the position stays: it is where the rank failed.
        """
        before = self.now
        self.now = Position(operation, before.step, micro_batch, stage)
        yield
        self.now = dataclasses.replace(before, since=time.monotonic())

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the present operation waits for other ranks, until the block ends."""
        before = self.now
        self.now = dataclasses.replace(before, waits=True, since=time.monotonic())
        yield
        self.now = dataclasses.replace(before, since=time.monotonic())
