"""Whether replicas still have the same weights: a bit that memory or a processor changed on one of them is named.

Replicas have the same bits by design, so sums over the bits of each shard must be equal, and any one bit changes its
sum. Where each replica has all masters and optimizer state, these count as well, and a difference stays until it is
found. With shared state, parameters alone can be compared, and each step makes them from the masters of one replica:
a change of a copy is seen if it came since the last step, and one of a master is the same everywhere.
"""

import socket
import time
from collections import Counter
from collections.abc import Sequence

import torch
from loguru import logger
from torch import Tensor

from openchatkit.distributed.layout import Layout
from openchatkit.training.rank_weights import RankWeights

# Integers of as many bytes as an element: sums of them wrap, on every device in the same way.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck:
    """Compares the weights of replicas; `shares_state`: masters and optimizer state are no replica's alone."""

    def __init__(self, weights: RankWeights, *, shares_state: bool) -> None:
        self._weights, self._layout, self._shares_state = weights, weights.layout, shares_state
        self._runs = 0

    def find_difference(self) -> str | None:
        """Return which rank has other bits than its replicas, and in which shard, in words; None if all are the same.

        All ranks call this and get the same answer. The first time, its cost is logged.
        """
        started = time.perf_counter()
        sums = self._sum_shards()
        digests = self._layout.gather(hash(tuple(sums.values())))
        self._runs += 1
        if self._runs == 1 and self._layout.rank == 0:
            logger.info("comparing replicas takes {:.3f} s", time.perf_counter() - started)
        if all(len(set(each)) == 1 for each in _by_position(digests, self._layout)):
            return None
        return describe_difference(self._layout.gather(sums), self._layout.gather(socket.gethostname()), self._layout)

    @torch.no_grad()
    def _sum_shards(self) -> dict[str, int]:
        """Return the sum of the bits of each of this rank's shards."""
        sums = {
            shard: [_sum_bits(each) for each in module.parameters()]
            for shard, module in self._weights.stages.named_shards()
        }
        if not self._shares_state:
            for run, master in self._weights.masters.items():
                state = [each for each in self._weights.optimizer.state[master].values() if isinstance(each, Tensor)]
                sums[run.place.shard] += [_sum_bits(each) for each in (master, *state)]
        # Masters in main memory, and counts of steps, are beside parameters on a GPU.
        device = self._layout.device
        stacks = {shard: torch.stack([each.to(device) for each in of_shard]) for shard, of_shard in sums.items()}
        return {shard: int(stack.sum()) for shard, stack in stacks.items()}


def describe_difference(sums: Sequence[dict[str, int]], hosts: Sequence[str], layout: Layout) -> str:
    """Return where the sums of shards, one dictionary a rank, differ between replicas; they must in some place.

    The rank is named that differs from most of its replicas. Of two that differ, none can say which is right.
    """
    for members in _by_position(list(range(len(sums))), layout):
        for shard in sums[members[0]]:
            found = [sums[rank][shard] for rank in members]
            [(usual, count), *others] = Counter(found).most_common()
            if not others:
                continue
            if count * 2 > len(members):
                wrong = [rank for rank, value in zip(members, found, strict=True) if value != usual]
                which = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in wrong)
                return f"{shard} of {which} is not that of its other {count} replicas"
            which = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in members)
            return f"{shard} differs between {which}, of which one is wrong"
    raise AssertionError("the sums are the same")


def _by_position(values: Sequence[int], layout: Layout) -> list[Sequence[int]]:
    """Return the values of ranks with the same place in their replicas, for each place; `values` are by rank."""
    size = layout.pipeline_size * layout.tensor_size
    return [values[position::size] for position in range(size)]


def _sum_bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
