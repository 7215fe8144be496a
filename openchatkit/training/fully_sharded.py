"""Weights of which each replica has its rows alone: parameters, gradients and optimizer state are shared (ZeRO-3).

torch's `fully_shard` does the work during forward and backward passes. It gathers a shard's matrices, in the dtype of
products, just before the shard computes; frees them after; and adds their gradients over replicas in float32 as soon as
a backward pass has them. Those of the head stay until its backward pass, since `VocabularyLoss` reads the projection
and writes its gradient before.

Norms and biases are whole on every replica, as plain float32 parameters, and so is their optimizer state: they are less
than a thousandth of a model, and are not to be rounded to the dtype of products.

For a rank of one stage: a pipeline would gather every layer again for each of its micro-batches.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from openchatkit.distributed.layout import Layout
from openchatkit.libraries import pytorch
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, shard_names
from openchatkit.models.stage import Stage
from openchatkit.training.buckets import Flat, gather_buckets
from openchatkit.training.gradients import add_over_layers, gradient_of
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.rank_weights import OptimizerState, RankWeights, gather_pieces
from openchatkit.training.runs import Place, Run, is_tied_copy


class MatrixSharding:
    """How a stage's matrices are spread over the replicas of a layout, which are at least two.

    Each replica has as many rows as `torch.chunk` gives it, perhaps none. Layers compute in `dtype`, the embedding in
    float32.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        assert layout.data is not None, layout.describe()
        self._mesh = DeviceMesh.from_group(layout.data, layout.device.type)
        self._copied = dtype if pytorch.keeps_gradients_in_float32() else torch.float32

    def cut(self, shard: str, module: nn.Module) -> None:
        """Reduce a filled shard's matrices to this replica's rows; the others' memory is free after. Sends nothing."""
        sharded = self._wrap(module, None if shard == EMBED else self._copied, stays=shard == HEAD)
        # The step's loss is divided by the tokens of all replicas: gradients are to be added, and nothing else.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def connect(self, stage: Stage) -> None:
        """Let a stage, all of whose shards were cut, gather one of them while it computes another."""
        self._wrap(stage, None, stays=True)
        head = stage.shards[HEAD]

        def prepare(*_: Any) -> None:
            pytorch.keep_gradient_in_float32(stage.projection.weight)

        def complete(gradient: Tensor) -> None:
            # Without a trained token there is none, and the other replicas wait for it.
            weight = stage.projection.weight
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=pytorch.gradient_dtype(weight))

        def watch(_: nn.Module, __: Any, hidden: Tensor) -> None:
            if hidden.requires_grad:
                hidden.register_hook(complete)  # type: ignore[no-untyped-call]

        if self._copied != torch.float32:
            head.register_forward_pre_hook(prepare)  # after fully_shard's own, which has gathered the projection
        head.register_forward_hook(watch)

    def _wrap(self, module: nn.Module, dtype: torch.dtype | None, *, stays: bool) -> FSDPModule:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        vectors = {parameter for parameter in module.parameters() if parameter.dim() == 1}
        return fully_shard(
            module, mesh=self._mesh, reshard_after_forward=not stays, mp_policy=policy, ignored_params=vectors
        )


class FullyShardedWeights(RankWeights):
    """The weights of a rank of one stage, whose shards `sharding` has cut. See the module."""

    def __init__(self, stages: LocalStages, layout: Layout, sharding: MatrixSharding) -> None:
        super().__init__(stages, layout)
        [self._stage] = stages
        sharding.connect(self._stage)
        self._cuts = family(stages.config).cuts(stages.config)
        self._vectors = {key: each for key, each in self._parameters.items() if not isinstance(each, DTensor)}
        assert all(each.dim() == 1 for each in self._vectors.values()), list(self._vectors)
        self.masters = {self._own_run(*key): own_rows(each) for key, each in self._parameters.items()}

    def expect_passes(self, passes: int) -> None:
        """Do nothing: gradients are exchanged during each backward pass."""

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Add what `fully_shard` has not: gradients of vectors, and those of what layers or tied ends share."""
        for parameter in self._vectors.values():
            if parameter.grad is None:  # the bias of a projection, without a trained token
                parameter.grad = torch.zeros_like(parameter)
        shares = [each for (_, name), each in self._vectors.items() if self._cuts[name] == "whole"]
        _add_gradients(shares, self.layout.tensor)
        _add_gradients(list(self._vectors.values()), self.layout.data)
        kind = family(self.stages.config)
        tables = {key: each for key, each in self._parameters.items() if key[1] in kind.of_all_layers}
        add_over_layers(self.stages, self.layout, {key: own_rows(gradient_of(each)) for key, each in tables.items()})
        if self.stages.config.tie_embeddings:
            keys = ((EMBED, kind.embedding_weight), (HEAD, kind.tied_weight))
            first, last = (own_rows(gradient_of(self._parameters[key])) for key in keys)
            first.add_(last)
            last.copy_(first)

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each shard's gradient; see `RankWeights.squared_norms`."""
        norms = torch.zeros(self.stages.config.num_layers + 2, dtype=torch.float64, device=self.layout.device)
        for run in filter(self.counts, self.masters):
            gradient = own_rows(gradient_of(self.parameter(run)))
            norms[run.place.shard_number] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        self.layout.sum_over_replicas(norms)
        return norms

    @torch.no_grad()
    def step(self, factor: float, lr: float) -> None:
        """Update this replica's rows with the gradients times `factor`; the next forward pass gathers what they are."""
        gradients = [own_rows(gradient_of(self.parameter(run))) for run in self.masters]
        if not pytorch.scale_gradients_in_step(self.optimizer, factor) and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()

    def drop_gradients(self) -> None:
        """Free the memory of all gradients."""
        for tensor in (*self._parameters.values(), *self.masters.values()):
            tensor.grad = None

    def release_copies(self) -> None:
        """Free the head's matrices, which stay after a forward pass."""
        head = self._stage.shards[HEAD]
        assert isinstance(head, FSDPModule), type(head)
        head.reshard()

    def is_on_all_replicas(self, run: Run) -> bool:
        """Whether every replica has the master of a run: of vectors."""
        return run.place.key in self._vectors

    def writer(self, shard: str) -> int:
        """Return the replica that writes a shard: replicas take turns, since all have as much of it."""
        return self.stages.shards.index(shard) % self.layout.replicas

    @torch.no_grad()
    def gather(self, shard: str) -> dict[str, tuple[Tensor, OptimizerState]] | None:
        """Return the weight and the optimizer's state of each parameter of a shard; see `RankWeights.gather`.

        The other replicas send their rows of one tensor after the other.
        """
        writer = self.writer(shard)
        own: dict[str, tuple[Tensor, OptimizerState]] = {}
        for run, master in self.masters.items():
            if run.place.shard != shard or is_tied_copy(self.stages, run.place):
                continue
            state = {
                key: self._gather_rows(value, run, writer) if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state[master].items()
            }
            own[run.place.name] = self._gather_rows(master, run, writer), state
        return self._gather_parts(own) if self.layout.replica == writer else None

    def _gather_rows(self, tensor: Tensor, run: Run, writer: int) -> Tensor:
        """Return all rows at the writer, on the CPU, of a tensor that has those of a run; others are whole already."""
        parameter = self.parameter(run)
        if run.place.key in self._vectors or tensor.shape != own_rows(parameter).shape:
            return tensor.detach().cpu()
        assert self.layout.data is not None
        borders = self._borders(parameter.shape)
        padded = tensor.new_zeros(borders[1], *parameter.shape[1:])
        padded[: len(tensor)] = tensor
        pieces = gather_pieces(padded, self.layout.data, to=writer)
        if pieces is None:
            return tensor
        return torch.cat(
            [each[: stop - start] for each, start, stop in zip(pieces, borders, borders[1:], strict=False)]
        )

    def _own_run(self, shard: str, name: str) -> Run:
        parameter, number = self._parameters[shard, name], shard_names(self.stages.config.num_layers).index(shard)
        place = Place(shard, name, parameter.numel(), number)
        if (shard, name) in self._vectors:
            return Run(place, 0, place.elements, self.layout.replica)
        borders, width = self._borders(parameter.shape), math.prod(parameter.shape[1:])
        start, stop = borders[self.layout.replica], borders[self.layout.replica + 1]
        assert own_rows(parameter).shape[0] == stop - start, (shard, name, start, stop)
        return Run(place, start * width, stop * width, self.layout.replica)

    def _borders(self, shape: Sequence[int]) -> list[int]:
        """Return where each replica's rows of a matrix start, and where the last one's stop, as `torch.chunk` cuts."""
        each = math.ceil(shape[0] / self.layout.replicas)
        return [min(each * replica, shape[0]) for replica in range(self.layout.replicas + 1)]


def own_rows(tensor: Tensor) -> Tensor:
    """Return the memory that holds this replica's rows of a matrix, as a plain tensor; a vector is its own."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _add_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Add the gradients of parameters over a group."""
    if group is None:
        return
    for bucket in gather_buckets([gradient_of(parameter) for parameter in parameters], Tensor.numel):
        with Flat(bucket) as flat:
            dist.all_reduce(flat, group=group)
