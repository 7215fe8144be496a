"""How much of a build is done at a time. What is built does not depend on it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Sizes of what goes to worker processes, and how often progress is saved.

    Of input: `batch_bytes` go in a message to a worker, so large that messages cost little, so small that all workers
    are busy to the end; up to `alone_bytes` are done before workers would have started. Progress is saved after
    `save_tokens` (32 Mi are 64 MB where an id takes two bytes) or `save_seconds`.
    """

    batch_bytes: int = 1 << 17
    alone_bytes: int = 4 << 20
    save_tokens: int = 32 << 20
    save_seconds: float = 30.0
