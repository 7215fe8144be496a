"""Several processes, started by torchrun, that embed parts of the same texts: they share the plan and the outcome.

Passages and vectors go through files in the folder of the index, which all must see; only short messages go between
processes. A process that fails reports it before the others continue, and one that dies closes the connection, so no
process waits for it.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from openchatkit.errors import Interrupted, UserError

_TIMEOUT = timedelta(days=7)  # the first process reads files while the others wait


@dataclass(frozen=True)
class Ranks:
    """The number of this process, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process does the work of a single process."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Return the `value` of the first process in all processes."""
        return self.gather(value)[0]

    def agree(self, error: Exception | None) -> None:
        """Return once all processes are here without an error. UserError: one has failed, possibly this one."""
        found = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, message in enumerate(found):
            if message is not None:
                raise UserError(f"process {rank} stopped: {message}")

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of each process, in the order of their numbers."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise Interrupted(
                "another process was lost: run the same command again, what has been embedded is kept"
            ) from error
        return found


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Join the processes that torchrun started, or run alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    import torch

    from openchatkit.distributed.network import choose_interface
    from openchatkit.distributed.rendezvous import connect, disconnect

    rank = int(os.environ["RANK"])
    choose_interface(None, os.environ.get("MASTER_ADDR", ""))
    connect(None, rank=rank, world_size=size, device=torch.device("cpu"), timeout=_TIMEOUT)
    try:
        yield Ranks(rank, size)
    finally:
        disconnect()
