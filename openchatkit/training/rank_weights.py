"""The face of a rank's weights that a step, the optimizer and checkpoints see, however replicas keep them.

Owns what all ways of keeping them have in common: which parameters there are, how an optimizer's stored state comes to
this rank's share of them, and how the parts of a tensor group are put together for a checkpoint.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openchatkit.distributed.layout import Layout
from openchatkit.models.cuts import Cut, cut_tensor, is_cut, join_tensor, whole_shape
from openchatkit.models.registry import family
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.runs import Run, is_counted_elsewhere

OptimizerState = dict[str, Any]  # of one parameter: tensors and numbers by key


class RankWeights(abc.ABC):
    """The weights of a rank's stages, with their float32 masters and gradients; made once the stages are filled.

    `masters` are the tensors that the optimizer updates, each for its run of a parameter's elements; `optimizer` is set
    before the first step. Gradients are summed over replicas, not averaged: losses are divided by the tokens of all.
    """

    optimizer: torch.optim.Optimizer
    masters: dict[Run, Tensor]

    def __init__(self, stages: LocalStages, layout: Layout) -> None:
        self.stages, self.layout = stages, layout
        self._parameters: dict[tuple[str, str], nn.Parameter] = {
            (shard, name): parameter
            for shard, module in stages.named_shards()
            for name, parameter in module.named_parameters()
        }

    def parameter(self, run: Run) -> nn.Parameter:
        """Return the parameter of a run."""
        return self._parameters[run.place.key]

    @abc.abstractmethod
    def expect_passes(self, passes: int) -> None:
        """Prepare for steps of so many backward passes. Call it once."""

    @abc.abstractmethod
    def reduce_gradients(self) -> None:
        """Add gradients over parts, both ends of tied embeddings, and replicas, after a step's last backward pass."""

    @abc.abstractmethod
    def squared_norms(self) -> Tensor:
        """Return the squared norm of each shard's gradient in float64 [num_layers + 2], 0 for those of other ranks.

        In a tensor group, each rank counts its own part, and the first what all have: their sum is the whole norm.
        """

    @abc.abstractmethod
    def step(self, factor: float, lr: float) -> None:
        """Update the weights with the gradients times `factor`, for all replicas."""

    @abc.abstractmethod
    def drop_gradients(self) -> None:
        """Start the sums of the next step."""

    @abc.abstractmethod
    def release_copies(self) -> None:
        """Free what forward passes without a backward pass have left to compute with."""

    @abc.abstractmethod
    def writer(self, shard: str) -> int:
        """Return the replica that writes a shard."""

    @abc.abstractmethod
    def gather(self, shard: str) -> dict[str, tuple[Tensor, OptimizerState]] | None:
        """Return the float32 weight and the optimizer's state of each parameter that a shard stores, on the CPU.

        All ranks of this pipeline rank's replicas and parts call it together, for their shards in one order; ranks
        other than the shard's writer (see `writer`) and the first of its tensor group get None.
        """

    def counts(self, run: Run) -> bool:
        """Whether a run of this rank's masters is counted here in sums over all ranks, of which others may have it."""
        is_cut = family(self.stages.config).cuts(self.stages.config)[run.place.name] != "whole"
        is_first = (is_cut or self.stages.part.index == 0) and not is_counted_elsewhere(self.stages, run.place)
        return is_first and (self.layout.replica == 0 or not self.is_on_all_replicas(run))

    @abc.abstractmethod
    def is_on_all_replicas(self, run: Run) -> bool:
        """Whether every replica has the master of a run, or but one."""

    def take_state(self, shard: str, stored: Mapping[str, OptimizerState]) -> None:
        """Give the optimizer its state of a shard's parameters, of which `stored` holds that of the whole."""
        cuts = family(self.stages.config).cuts(self.stages.config)
        for run, master in self.masters.items():
            if run.place.shard != shard:
                continue
            name, shape = run.place.name, self.parameter(run).shape
            whole = whole_shape(shape, cuts[name], self.stages.part.count)
            self.optimizer.state[master] = {
                key: self._take_run(key, value, run, whole, cuts[name], master) if isinstance(value, Tensor) else value
                for key, value in stored[name].items()
            }

    def _take_run(self, key: str, value: Tensor, run: Run, whole: Sequence[int], cut: Cut, master: Tensor) -> Tensor:
        """Return a run's share of one tensor of an optimizer's state, as a copy: what is read is a view of the file."""
        if tuple(value.shape) == tuple(whole):
            flat = cut_tensor(value, cut, self.stages.part).flatten()
            value = flat[run.start : run.stop].view(master.shape)
        return value.to(master.device, copy=True)

    def _gather_parts(
        self, own: dict[str, tuple[Tensor, OptimizerState]]
    ) -> dict[str, tuple[Tensor, OptimizerState]] | None:
        """Return whole parameters and state on the first rank of the tensor group, None on the others."""
        group, cuts = self.layout.tensor, family(self.stages.config).cuts(self.stages.config)
        if group is None:
            return own
        joined = {}

        def gather(tensor: Tensor, cut: Cut) -> Tensor:
            if not is_cut(cut):
                return tensor
            pieces = gather_pieces(tensor.to(self.layout.device), group, to=0)
            return tensor if pieces is None else join_tensor(pieces, cut)

        for name, (weight, state) in own.items():
            shape = weight.shape
            joined[name] = (
                gather(weight, cuts[name]),
                {
                    key: gather(value, cuts[name]) if isinstance(value, Tensor) and value.shape == shape else value
                    for key, value in state.items()
                },
            )
        return joined if self.layout.tensor_rank == 0 else None


def gather_pieces(piece: Tensor, group: dist.ProcessGroup, *, to: int) -> list[Tensor] | None:
    """Return the pieces, of one shape, of all ranks of a group in their order, on the CPU of its rank `to`; else None.

    All ranks of the group call it together, with tensors on the device that the group's messages come from.
    """
    piece, root = piece.contiguous(), dist.get_global_rank(group, to)
    if dist.get_rank() != root:
        dist.gather(piece, None, root, group=group)
        return None
    pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size(group))]
    dist.gather(piece, pieces, root, group=group)
    return [each.cpu() for each in pieces]
