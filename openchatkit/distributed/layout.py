"""The layout of a job's ranks: pipelines, replicas and tensor groups, their process groups, each stage's layers."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from openchatkit.distributed.activity import Activity
from openchatkit.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """This rank's position: rank = (replica x pipeline_size + pipeline_rank) x tensor_size + tensor_rank.

    A group of one rank is None, and needs no communication: `tensor` joins the ranks that share a stage's layers,
    `pipeline` those that a batch passes through, `data` the replicas of this rank, `control` (gloo) every rank. `ends`
    joins the first and the last rank of this pipeline; other ranks, and models that need none, have None. `activity` is
    where the main thread notes what it does; what waits for a group here notes it itself.
    """

    rank: int
    device: torch.device
    pipeline_size: int = 1
    replicas: int = 1
    tensor_size: int = 1
    pipeline: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    ends: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    activity: Activity = field(default_factory=Activity, compare=False)

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.pipeline_size * self.replicas * self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Number of this rank in its tensor group, from 0."""
        return self.rank % self.tensor_size

    @property
    def pipeline_rank(self) -> int:
        """Number of this rank in its pipeline, from 0."""
        return self.rank // self.tensor_size % self.pipeline_size

    @property
    def replica(self) -> int:
        """Number of this rank's replica, from 0."""
        return self.rank // (self.tensor_size * self.pipeline_size)

    def describe(self, host: str | None = None) -> str:
        """Return this rank in words, for messages; with the host that it runs on, if given."""
        rank = f"rank {self.rank}" if host is None else f"rank {self.rank} on {host}"
        axes = [
            ("pipeline rank", self.pipeline_rank, self.pipeline_size),
            ("replica", self.replica, self.replicas),
            ("tensor rank", self.tensor_rank, self.tensor_size),
        ]
        named = [f"{name} {number} of {size}" for name, number, size in axes if size > 1]
        return f"{rank} ({', '.join(named)})" if named else rank

    def sum_over_replicas(self, *tensors: torch.Tensor) -> None:
        """Add each tensor over the replicas of this rank, in place."""
        self._sum(tensors, self.data)

    def sum_over_pipeline(self, *tensors: torch.Tensor) -> None:
        """Add each tensor over the ranks of this pipeline, in place."""
        self._sum(tensors, self.pipeline)

    def sum_over_parts(self, *tensors: torch.Tensor) -> None:
        """Add each tensor over the ranks of this tensor group, in place."""
        self._sum(tensors, self.tensor)

    def sum_over_ends(self, *tensors: torch.Tensor) -> None:
        """Add each tensor over the first and the last rank of this pipeline, in place."""
        self._sum(tensors, self.ends)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on all ranks. Values are pickled between our own processes only."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.activity.waiting():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Return the results of `action` on all ranks. If it raises a UserError on any, all raise that of the first."""
        results, errors = self.attempt(action)
        if errors:
            raise errors[0]
        return results

    def attempt(self, action: Callable[[], T]) -> tuple[list[T], list[UserError]]:
        """Return the results of `action` on all ranks, and the UserErrors of those where it raised one, by rank."""
        outcome: T | UserError
        try:
            outcome = action()
        except UserError as error:
            outcome = error
        outcomes: list[T | UserError] = self.gather(outcome)
        errors = [each for each in outcomes if isinstance(each, UserError)]
        return [each for each in outcomes if not isinstance(each, UserError)], errors

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.control is not None:
            with self.activity.waiting():
                dist.barrier(group=self.control)

    def _sum(self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
        if group is not None:
            with self.activity.waiting():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=group)


def make_layout(
    *,
    rank: int,
    pipeline_size: int = 1,
    replicas: int = 1,
    tensor_size: int = 1,
    join_ends: bool = False,
    device: torch.device,
    timeout: timedelta,
) -> Layout:
    """Lay out the ranks of an initialised process group, whose own timeout should be `timeout` as well."""
    layout = Layout(rank, device, pipeline_size, replicas, tensor_size)
    if layout.world_size == 1:
        return layout
    ranks = torch.arange(layout.world_size).view(replicas, pipeline_size, tensor_size)
    tensor = _own_group(ranks.flatten(0, 1), rank, timeout)
    pipeline = _own_group(ranks.transpose(1, 2).flatten(0, 1), rank, timeout)
    data = _own_group(ranks.flatten(1).T, rank, timeout)
    ends = pipeline if join_ends and pipeline_size == 2 else None
    if join_ends and pipeline_size > 2:
        ends = _own_group(ranks[:, [0, -1]].transpose(1, 2).flatten(0, 1), rank, timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return replace(layout, tensor=tensor, pipeline=pipeline, data=data, ends=ends, control=control)


def stage_numbers(pipeline_rank: int, *, pipeline_size: int, stages_a_rank: int, v_shaped: bool = False) -> list[int]:
    """Return the numbers of the stages that a rank of a pipeline has, in the order of the data's flow.

    Data goes round all ranks as often as each has stages: always from the first to the last rank, or `v_shaped` back
    on every other way, which brings both ends of the model to the first rank where the ways are even in number.
    """
    return [
        way * pipeline_size + (pipeline_size - 1 - pipeline_rank if v_shaped and way % 2 else pipeline_rank)
        for way in range(stages_a_rank)
    ]


def stage_layers(num_layers: int, *, stages: int, layers_per_stage: int) -> list[tuple[int, int]]:
    """Return the first and the last (exclusive) layer of each stage; every stage but the last has `layers_per_stage`.

    0 spreads the layers evenly. UserError when the stages cannot hold all layers or one would have none.
    """
    if not layers_per_stage:
        if num_layers < stages:
            raise UserError(
                f"{stages} stages, the model has only {num_layers} layers: give a smaller --pipeline-group-size or "
                "--stages-per-rank"
            )
        borders = [round(i * num_layers / stages) for i in range(stages + 1)]
        return list(itertools.pairwise(borders))
    enough = math.ceil(num_layers / stages)
    if layers_per_stage * stages < num_layers:
        raise UserError(
            f"--num-layers {layers_per_stage} x {stages} stages = {layers_per_stage * stages} layers, "
            f"the model has {num_layers}: give --num-layers {enough}"
        )
    if layers_per_stage * (stages - 1) >= num_layers:
        raise UserError(
            f"--num-layers {layers_per_stage} leaves the last of {stages} stages without a layer, "
            f"the model has {num_layers}: give --num-layers {enough} or fewer stages"
        )
    return [(i * layers_per_stage, min((i + 1) * layers_per_stage, num_layers)) for i in range(stages)]


def balanced_layers(num_layers: int, *, stages: int, head: float) -> list[tuple[int, int]]:
    """Return the first and the last (exclusive) layer of each stage, such that the slowest is as fast as it can be.

    The head, in the last stage, costs as much as `head` layers. Every stage has a layer. UserError with too few layers.
    """
    others = stages - 1
    if others == 0 or num_layers <= stages:
        return stage_layers(num_layers, stages=stages, layers_per_stage=0)

    def slowest(last: int) -> float:
        return max(math.ceil((num_layers - last) / others), last + head)

    # Of equally good numbers of layers for the last stage the largest: the others have the less to hold.
    last = min(range(num_layers - others, 0, -1), key=slowest)
    borders = [round(i * (num_layers - last) / others) for i in range(stages)]
    return [*itertools.pairwise(borders), (num_layers - last, num_layers)]


def _own_group(members: torch.Tensor, rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Make a group of each row of ranks, in the same order on every rank, and return the one with `rank`, or None.

    Not by `init_device_mesh`: it makes its groups with torch's own timeout, half an hour with gloo, ten minutes with
    NCCL, whatever that of the whole job is (https://github.com/pytorch/pytorch/issues/119613).
    """
    if members.shape[1] == 1:
        return None
    if members.numel() == dist.get_world_size() == members.shape[1]:
        assert dist.group.WORLD is not None, "the process group is initialised"
        return dist.group.WORLD  # A second communicator of the same ranks would only take memory on the GPU.
    rows = members.tolist()
    groups: list[dist.ProcessGroup] = [dist.new_group(row, timeout=timeout) for row in rows]
    return next((group for group, row in zip(groups, rows, strict=True) if rank in row), None)
