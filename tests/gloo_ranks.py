"""A function on several ranks for tests: processes over gloo, each with one thread, that return tensors."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from forkserver import context


def run(function: Callable[[int], Any], count: int, folder: Path, *, seconds: float = 120) -> list[Any]:
    """Return `function(rank)` of `count` ranks that share torch's default group; tensors in lists, dicts and tuples.

    After `seconds` the ranks are killed, and the test fails. `function` is one of a test file, at its top level.
    """
    processes = [context.Process(target=_rank, args=(function, rank, count, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    statuses = [process.exitcode for process in processes]
    assert statuses == [0] * count, statuses
    import torch

    return [torch.load(folder / f"result_{rank}", weights_only=True) for rank in range(count)]


def _rank(function: Callable[[int], Any], rank: int, count: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    torch.save(function(rank), folder / f"result_{rank}")
    dist.barrier()
    dist.destroy_process_group()
