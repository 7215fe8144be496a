"""The layout of a job's ranks: stages of a pipeline times replicas of it, the layers of each stage, process groups."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from openchatkit.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """This rank's position: rank = replica x stages + stage. A group of one rank is None, and needs no communication.

    `pipeline` joins the stages of this replica, `data` the replicas of this stage, `control` (gloo) every rank.
    """

    rank: int
    stages: int
    replicas: int
    device: torch.device
    pipeline: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.stages * self.replicas

    @property
    def stage(self) -> int:
        """Number of this rank's stage, from 0."""
        return self.rank % self.stages

    @property
    def replica(self) -> int:
        """Number of this rank's replica, from 0."""
        return self.rank // self.stages

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's stage has the head."""
        return self.stage == self.stages - 1

    def describe(self) -> str:
        """Return this rank in words, for messages."""
        return f"rank {self.rank} (stage {self.stage} of {self.stages}, replica {self.replica} of {self.replicas})"

    def sum_over_replicas(self, *tensors: torch.Tensor) -> None:
        """Add each tensor over the replicas of this stage, in place."""
        if self.data is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.data)

    def sum_over_stages(self, *tensors: torch.Tensor) -> None:
        """Add each tensor over the stages of this replica, in place."""
        if self.pipeline is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.pipeline)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks. Values are pickled between our own processes only."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Return the results of `action` on all ranks. If it raises a UserError on any, all raise that of the first."""
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = error
        outcomes = self.gather((result, None if problem is None else str(problem)))
        for _, message in outcomes:
            if message is not None:
                raise UserError(message) from problem
        return [each for each, _ in outcomes]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.control is not None:
            dist.barrier(group=self.control)


def make_layout(*, rank: int, stages: int, replicas: int, device: torch.device, timeout: timedelta) -> Layout:
    """Lay out the ranks of an initialised process group, whose own timeout should be `timeout` as well."""
    if stages * replicas == 1:
        return Layout(rank, stages, replicas, device)
    pipelines = [range(replica * stages, (replica + 1) * stages) for replica in range(replicas)]
    lines = [range(stage, stages * replicas, stages) for stage in range(stages)]
    return Layout(
        rank,
        stages,
        replicas,
        device,
        pipeline=_own_group(pipelines, rank, timeout) if stages > 1 else None,
        data=_own_group(lines, rank, timeout) if replicas > 1 else None,
        control=dist.new_group(backend="gloo", timeout=timeout),
    )


def stage_layers(num_layers: int, *, stages: int, layers_per_stage: int) -> list[tuple[int, int]]:
    """Return the first and the last (exclusive) layer of each stage; every stage but the last has `layers_per_stage`.

    0 spreads the layers evenly. UserError when the stages cannot hold all layers or one would have none.
    """
    if not layers_per_stage:
        if num_layers < stages:
            raise UserError(f"--pipeline-group-size {stages}: the model has only {num_layers} layers")
        borders = [round(i * num_layers / stages) for i in range(stages + 1)]
        return list(itertools.pairwise(borders))
    enough = math.ceil(num_layers / stages)
    if layers_per_stage * stages < num_layers:
        raise UserError(
            f"--num-layers {layers_per_stage} x --pipeline-group-size {stages} = {layers_per_stage * stages} layers, "
            f"the model has {num_layers}: give --num-layers {enough}"
        )
    if layers_per_stage * (stages - 1) >= num_layers:
        raise UserError(
            f"--num-layers {layers_per_stage} leaves the last of {stages} stages without a layer, "
            f"the model has {num_layers}: give --num-layers {enough} or fewer stages"
        )
    return [(i * layers_per_stage, min((i + 1) * layers_per_stage, num_layers)) for i in range(stages)]


def _own_group(members: Sequence[range], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make a group of each of `members`, in the same order on every rank, and return the one that has `rank`.

    Not by `init_device_mesh`: it makes its groups with torch's own timeout, half an hour with gloo, ten minutes with
    NCCL, whatever that of the whole job is (https://github.com/pytorch/pytorch/issues/119613).
    """
    if len(members) == 1:
        assert dist.group.WORLD is not None, "the process group is initialised"
        return dist.group.WORLD  # A second communicator of the same ranks would only take memory on the GPU.
    groups: list[dist.ProcessGroup] = [dist.new_group(list(ranks), timeout=timeout) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
