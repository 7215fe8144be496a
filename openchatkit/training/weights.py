"""Parameters of a rank's stages, and the float32 masters and optimizer state that go with them.

Layers compute with copies of their matrices in the dtype of products. The optimizer updates float32 masters, which in
float32 are the parameters themselves. Replicas that share this state (ZeRO-1: Rajbhandari et al., arXiv 1910.02054) cut
all parameters of a rank, one after another, into one run of elements each: each replica updates its own run, and gives
the others what came of it. Elements are updated as they would be by a replica that has them all, so the bits are those
of plain replicas wherever sums over replicas have the same bits.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openchatkit.distributed.layout import Layout
from openchatkit.libraries import pytorch
from openchatkit.models.cuts import Cut
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED
from openchatkit.training.buckets import Flat, gather_buckets
from openchatkit.training.gradients import Gradients
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.rank_weights import OptimizerState, RankWeights
from openchatkit.training.runs import Run, cut_into_runs, is_tied_copy, list_places

_BLOCK = 256  # elements of an 8-bit state that share a scale
_SCALES = "absmax"  # how the keys of these begin; the table of 256 values beside them may be as long by chance


class Weights(RankWeights):
    """The weights of a rank's stages; made once these are filled in float32, on the device that trains.

    `sharded`: replicas share masters and optimizer state. `shard_gradients`: gradients as well, each of which is added
    over replicas as soon as a backward pass has it (ZeRO-2); for ranks of one stage without tied embeddings.
    `offloaded`: masters and state are in main memory, and the processor updates them. `through_cpu`: replicas exchange
    by gloo on the CPU.
    """

    def __init__(
        self,
        stages: LocalStages,
        layout: Layout,
        *,
        dtype: torch.dtype,
        sharded: bool = False,
        shard_gradients: bool = False,
        offloaded: bool = False,
        through_cpu: bool = False,
    ) -> None:
        super().__init__(stages, layout)
        self._offloaded, self._through_cpu = offloaded, through_cpu
        self.sharded = (sharded or shard_gradients) and layout.data is not None
        # Of all replicas, over the parameters that the first part has, and over those that this part has.
        self._all_runs = cut_into_runs(list_places(stages), layout.replicas if self.sharded else 1)
        self._runs = [run for run in self._all_runs if run.place.key in self._parameters]
        copied = dtype if pytorch.keeps_gradients_in_float32() else torch.float32
        owner = layout.replica if self.sharded else 0
        self.masters = {run: self._make_master(run, copied) for run in self._runs if run.owner == owner}
        for key, parameter in self._parameters.items():
            if copied != torch.float32 and self._is_used_in_products(*key):
                parameter.data = parameter.data.to(copied)
                pytorch.keep_gradient_in_float32(parameter)
        self._gradients = Gradients(
            stages,
            layout,
            self._parameters,
            self._runs,
            owner=owner if self.sharded else None,
            keeps_own=shard_gradients and self.sharded,
            through_cpu=through_cpu,
        )
        self._on_host: dict[Run, Tensor] = {}  # gradients in main memory, of masters that are there

    def expect_passes(self, passes: int) -> None:
        """Prepare to exchange gradients while a step's last backward pass goes on; see `Gradients.expect_passes`."""
        self._gradients.expect_passes(passes)

    def reduce_gradients(self) -> None:
        """Add gradients over parts, both ends of tied embeddings, and replicas; if sharded, those of own runs alone."""
        self._gradients.reduce()

    def squared_norms(self) -> Tensor:
        """Return the squared gradient norm of each shard; see `Gradients.squared_norms`."""
        return self._gradients.squared_norms()

    def step(self, factor: float, lr: float) -> None:
        """Update the weights with the gradients times `factor`; every replica has all of them afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not pytorch.scale_gradients_in_step(self.optimizer, factor) and factor != 1.0 and self.masters:
            torch._foreach_mul_([self._gradients.of(run) for run in self.masters], factor)
        if self._offloaded:
            self._step_on_host()
        else:
            self._step_with({run: self._gradients.of(run) for run in self.masters})
        if self.sharded:
            self._exchange_weights()

    def drop_gradients(self) -> None:
        """Start the sums of the next step."""
        self._gradients.clear()

    def release_copies(self) -> None:
        """Do nothing: copies of weights stay."""

    def is_on_all_replicas(self, run: Run) -> bool:
        """Whether every replica has the master of a run."""
        return not self.sharded

    def writer(self, shard: str) -> int:
        """Return the replica that writes a shard: the one that has most of it, or replicas in turn if all have it."""
        if not self.sharded:
            return self.stages.shards.index(shard) % self.layout.replicas
        shares = [0] * self.layout.replicas
        for run in self._all_runs:
            shares[run.owner] += run.elements * (run.place.shard == shard)
        return shares.index(max(shares))

    def gather(self, shard: str) -> dict[str, tuple[Tensor, OptimizerState]] | None:
        """Return the float32 weight and the optimizer's state of each parameter that a shard stores, on the CPU.

        All ranks of this pipeline rank's replicas and parts call it together, for their shards in one order; ranks
        other than the shard's writer (see `writer`) and the first of its tensor group get None.
        """
        writer = self.writer(shard)
        if not self.sharded and self.layout.replica != writer:
            return None
        own: dict[str, tuple[Tensor, OptimizerState]] = {}
        for place, runs in itertools.groupby(self._runs, key=lambda run: run.place):
            if place.shard == shard and not is_tied_copy(self.stages, place):
                pieces = [piece for piece in [self._send_to(writer, run) for run in runs] if piece is not None]
                if self.layout.replica == writer:
                    own[place.name] = _join_runs(pieces, self._parameters[shard, place.name].shape)
        return self._gather_parts(own) if self.layout.replica == writer else None

    def _take_run(self, key: str, value: Tensor, run: Run, whole: Sequence[int], cut: Cut, master: Tensor) -> Tensor:
        if tuple(value.shape) != tuple(whole) and key.startswith(_SCALES) and not run.is_whole:
            value = value[run.start // _BLOCK : math.ceil(run.stop / _BLOCK)]
        return super()._take_run(key, value, run, whole, cut, master)

    def _is_used_in_products(self, shard: str, name: str) -> bool:
        """Whether layers use a parameter in products alone: a matrix, but for tables, whose rows are looked up.

        The gradient of an embedding adds up over tokens within one call, and that of relative biases over pairs of
        them, where half a precision would not do.
        """
        is_table = shard == EMBED or name in family(self.stages.config).of_all_layers
        return self._parameters[shard, name].dim() > 1 and not is_table

    def _make_master(self, run: Run, copied: torch.dtype) -> Tensor:
        """Return what the optimizer updates: the parameter itself where that is whole and float32, else a copy."""
        parameter = self.parameter(run)
        is_apart = self._offloaded or (copied != torch.float32 and self._is_used_in_products(*run.place.key))
        if run.is_whole and not is_apart:
            return parameter
        values = parameter.detach()
        if not run.is_whole:
            values = values.view(-1)[run.start : run.stop]
        return values.to("cpu" if self._offloaded else values.device, copy=is_apart)

    def _global_rank(self, replica: int) -> int:
        assert self.layout.data is not None
        return dist.get_global_rank(self.layout.data, replica)

    @torch.no_grad()
    def _step_with(self, gradients: Mapping[Run, Tensor]) -> None:
        """Update the masters of some runs, and bring what came of them into the parameters."""
        where_autograd_adds = {run: self.masters[run].grad for run in gradients}  # of masters that are parameters
        for run, gradient in gradients.items():
            self.masters[run].grad = gradient.view_as(self.masters[run])
        self.optimizer.step()
        for run, attached in where_autograd_adds.items():
            master, parameter = self.masters[run], self.parameter(run)
            master.grad = attached
            if master.data_ptr() != parameter.data_ptr() + run.start * parameter.element_size():
                parameter.view(-1)[run.start : run.stop].copy_(master.view(-1), non_blocking=True)

    @torch.no_grad()
    def _step_on_host(self) -> None:
        """Take the step bucket by bucket in main memory, while gradients of later ones still come from the GPU."""
        on_gpu = self.layout.device.type == "cuda"
        if not self._on_host:
            self._on_host = {
                run: torch.empty(run.elements, pin_memory=on_gpu) if on_gpu else self._gradients.of(run)
                for run in self.masters
            }
        buckets, arrivals = list(gather_buckets(self.masters, lambda run: run.elements)), []
        for bucket in buckets if on_gpu else ():
            for run in bucket:
                self._on_host[run].copy_(self._gradients.of(run), non_blocking=True)
            arrivals.append(torch.cuda.current_stream().record_event())
        for bucket, arrival in itertools.zip_longest(buckets, arrivals):
            if arrival is not None:
                arrival.synchronize()
            self._step_with({run: self._on_host[run] for run in bucket})

    def _exchange_weights(self) -> None:
        """Bring what other replicas made of their masters into the parameters."""

        def kind(run: Run) -> tuple[int, str]:
            return run.owner, str(self.parameter(run).dtype)

        for (owner, _), runs in itertools.groupby(sorted(self._runs, key=kind), key=kind):
            pieces = [self.parameter(run).detach().view(-1)[run.start : run.stop] for run in runs]
            for bucket in gather_buckets(pieces, Tensor.numel):
                with Flat(bucket, on_cpu=self._through_cpu) as flat:
                    dist.broadcast(flat, self._global_rank(owner), group=self.layout.data)

    def _send_to(self, writer: int, run: Run) -> tuple[Run, Tensor, OptimizerState] | None:
        """Return a run with its master and state, on the CPU, if this replica is the writer; its owner sends them."""
        here = None
        if run in self.masters:
            state = self.optimizer.state[self.masters[run]]
            here = (run, _to_cpu(self.masters[run]).view(-1), {key: _to_cpu(value) for key, value in state.items()})
        if not self.sharded or run.owner == writer:
            return here
        # Few parameters are cut, and by gloo, which is there on every device. Pickled between our own processes only.
        if self.layout.replica == run.owner:
            assert here is not None, run
            # A copy: of a view, pickle takes the whole parameter that it is of.
            sent = (run, here[1].clone(), here[2])
            dist.send_object_list([sent], self._global_rank(writer), group=self.layout.control)
        elif self.layout.replica == writer:
            received: list[Any] = [None]
            dist.recv_object_list(received, self._global_rank(run.owner), group=self.layout.control)
            found: tuple[Run, Tensor, OptimizerState] = received[0]
            return found
        return None


def _join_runs(
    pieces: Sequence[tuple[Run, Tensor, OptimizerState]], shape: Sequence[int]
) -> tuple[Tensor, OptimizerState]:
    """Return a parameter's weight and state, from those of its runs in order."""
    runs, masters, states = zip(*pieces, strict=True)
    state = {}
    for key, value in states[0].items():
        if not isinstance(value, Tensor):
            state[key] = value
            continue
        values = [each[key] for each in states]
        if value.numel() == runs[0].elements and value.dim():
            state[key] = torch.cat([each.reshape(-1) for each in values]).view(shape)
        elif key.startswith(_SCALES):
            state[key] = torch.cat(values)
        else:
            state[key] = value  # a count of steps, or a table that all share
    return torch.cat(masters).view(shape), state


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
