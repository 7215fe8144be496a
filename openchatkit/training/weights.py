"""Parameters of a rank's stages, their float32 masters and gradients: whole on every replica, or in slices.

Layers compute with copies of their matrices in the dtype of products. The optimizer updates float32 masters, which in
float32 are the parameters themselves; gradients are float32 throughout. Replicas that share this state (ZeRO-1:
Rajbhandari et al., arXiv 1910.02054) cut all parameters of a rank, one after another, into one run of elements each:
each replica updates its own run, and gives the others what came of it. Elements are updated as they would be by a
replica that has them all, so the bits are those of plain replicas wherever sums over replicas have the same bits.

Runs begin at whole units. bitsandbytes keeps the state of parameters with fewer elements than a unit in 32 bits, and
that of others in 8-bit blocks that begin at the first element, so units have the same blocks in a run as in the whole.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openchatkit.distributed.layout import Layout
from openchatkit.libraries import pytorch
from openchatkit.models.cuts import Cut, cut_tensor, join_tensor, whole_shape
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, shard_names
from openchatkit.training.local_stages import LocalStages

UNIT = 4096  # elements
_BLOCK = 256  # elements of an 8-bit state that share a scale
_SCALES = "absmax"  # how the keys of these begin; the table of 256 values beside them may be as long by chance
_BUCKET = 1 << 25  # elements that one collective takes

OptimizerState = dict[str, Any]  # of one parameter: tensors and numbers by key


@dataclass(frozen=True)
class Place:
    """A parameter's shard, name and number of elements here, and the number of the shard in the whole model."""

    shard: str
    name: str
    elements: int
    shard_number: int


@dataclass(frozen=True)
class Run:
    """Elements `start` to `stop` (exclusive) of a flattened parameter, which the replica `owner` updates."""

    place: Place
    start: int
    stop: int
    owner: int

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the parameter."""
        return self.stop - self.start == self.place.elements

    @property
    def units(self) -> int:
        """Number of sums that the gradient's norm is added up from: a unit's each, and the rest's at the end."""
        return math.ceil((self.stop - self.start) / UNIT)


class Weights:
    """The weights of a rank's stages; made once these are filled in float32, on the device that trains.

    `sharded`: replicas share masters and optimizer state. `shard_gradients`: gradients as well, each of which is added
    over replicas as soon as a backward pass has it (ZeRO-2); for ranks of one stage without tied embeddings.
    `offloaded`: masters and state are in main memory, and the processor updates them. `through_cpu`: replicas exchange
    by gloo on the CPU. `optimizer` is set before the first step; it updates `masters`.
    """

    optimizer: torch.optim.Optimizer

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
        self.stages, self.layout, self._offloaded, self._through_cpu = stages, layout, offloaded, through_cpu
        self.sharded = (sharded or shard_gradients) and layout.data is not None
        self._parameters = {
            (shard, name): parameter
            for shard, module in stages.named_shards()
            for name, parameter in module.named_parameters()
        }
        # Of all replicas, over the parameters that the first part has, and over those that this part has.
        self._all_runs = _cut_into_runs(_list_places(stages), layout.replicas if self.sharded else 1)
        self._runs = [run for run in self._all_runs if (run.place.shard, run.place.name) in self._parameters]
        copied = dtype if pytorch.keeps_gradients_in_float32() else torch.float32
        owner = layout.replica if self.sharded else 0
        self.masters = {run: self._make_master(run, copied) for run in self._runs if run.owner == owner}
        for (shard, _), parameter in self._parameters.items():
            if copied != torch.float32 and _computes_in_products(shard, parameter):
                parameter.data = parameter.data.to(copied)
                pytorch.keep_gradient_in_float32(parameter)
        self._sums: dict[Run, Tensor] = {}  # of gradients over replicas and passes so far, of own runs
        self._ready: list[tuple[str, str]] = []  # parameters whose gradients are to be added to `_sums`
        self._shards_gradients = shard_gradients and self.sharded
        if self._shards_gradients:
            assert not stages.config.tie_embeddings, "their gradients belong to two parameters"
            for key, parameter in self._parameters.items():
                hook = functools.partial(self._collect, key)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def parameter(self, run: Run) -> nn.Parameter:
        """Return the parameter of a run."""
        return self._parameters[run.place.shard, run.place.name]

    def reduce_gradients(self) -> None:
        """Add gradients over parts, both ends of tied embeddings, and replicas; if sharded, those of own runs alone."""
        # Of gradients that are shared, those of the projection are left, which the loss writes.
        left = [key for key in self._parameters if not self._shards_gradients or self._is_projection(*key)]
        for key in left:
            parameter = self._parameters[key]
            if parameter.grad is None:
                # None of this rank's tokens was trained on; the other ranks still wait for its gradient.
                parameter.grad = torch.zeros_like(parameter, dtype=pytorch.gradient_dtype(parameter))
        if self._shards_gradients:
            self._ready += left
            self._reduce_ready()
        self._add_over_parts()
        self._add_tied_gradients()
        if self.layout.data is not None and not self._shards_gradients:
            for owner, runs in itertools.groupby(self._runs, key=lambda run: run.owner):
                self._add_over_replicas([self._gradient(run) for run in runs], owner)

    def _add_over_parts(self) -> None:
        if self.layout.tensor is None:
            return
        cuts = family(self.stages.config).cuts
        runs = self.masters if self._shards_gradients else self._runs
        for bucket in _buckets([self._gradient(run) for run in runs if cuts[run.place.name] == "whole"]):
            with _Flat(bucket) as flat:
                dist.all_reduce(flat, group=self.layout.tensor)

    def _add_over_replicas(self, gradients: Sequence[Tensor], owner: int) -> None:
        for bucket in _buckets(gradients):
            with _Flat(bucket, on_cpu=self._through_cpu) as flat:
                if self.sharded:
                    dist.reduce(flat, self._global_rank(owner), group=self.layout.data)
                else:
                    dist.all_reduce(flat, group=self.layout.data)

    def _collect(self, key: tuple[str, str], _: Tensor) -> None:
        """Take note of a gradient that a backward pass is done with; some together are worth a message."""
        self._ready.append(key)
        if sum(self._parameters[each].numel() for each in self._ready) >= _BUCKET:
            self._reduce_ready()

    @torch.no_grad()
    def _reduce_ready(self) -> None:
        """Add ready gradients over replicas, keep the sums of own runs, and free the rest.

        Backward passes of all replicas come to their gradients in the same order, and so do these messages.
        """
        ready, self._ready = set(self._ready), []
        runs = [run for run in self._runs if (run.place.shard, run.place.name) in ready]
        for owner, of_owner in itertools.groupby(runs, key=lambda run: run.owner):
            owned = list(of_owner)
            self._add_over_replicas([self._gradient(run, so_far=False) for run in owned], owner)
            for run in owned if owner == self.layout.replica else ():
                gradient = self._gradient(run, so_far=False)
                if run in self._sums:
                    self._sums[run].add_(gradient)
                else:
                    self._sums[run] = gradient.clone()
        for key in ready:
            self._parameters[key].grad = None

    def squared_norms(self) -> Tensor:
        """Return the squared gradient norm of each shard in float64 [num_layers + 2], 0 for those of other ranks.

        In a tensor group, each rank counts its own part, and the first what all have: their sum is the whole norm.
        Sums of units are added in the order of the data's flow, so that the bits are the same over any stages and runs.
        """
        cuts = family(self.stages.config).cuts
        sums = []
        for run in self._runs:
            counts = not self._is_tied_copy(run.place) and not (
                cuts[run.place.name] == "whole" and self.stages.part.index
            )
            known = counts and run in self.masters
            sums.append(_sums_of_squares(self._gradient(run)) if known else self._zeros(run.units))
        flat = torch.cat(sums)
        if self.sharded:
            self.layout.sum_over_replicas(flat)  # of which all but one have zeros
        norms = self._zeros(self.stages.config.num_layers + 2)
        parts = zip(self._runs, torch.split(flat, [len(each) for each in sums]), strict=True)
        for number, of_shard in itertools.groupby(parts, key=lambda pair: pair[0].place.shard_number):
            norms[number] = torch.cat([each for _, each in of_shard]).sum()
        return norms

    def step(self, factor: float, lr: float) -> None:
        """Update the weights with the gradients times `factor`; every replica has all of them afterwards."""
        gradients = [self._gradient(run) for run in self.masters]
        if gradients and factor != 1.0:  # a replica of a small stage may have none
            torch._foreach_mul_(gradients, factor)
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            if not isinstance(master, nn.Parameter) or master.grad is None:
                master.grad = gradient.view_as(master).to(master.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            self._publish()

    def drop_gradients(self) -> None:
        """Free the memory of all gradients."""
        self._sums.clear()
        for tensor in (*self._parameters.values(), *self.masters.values()):
            tensor.grad = None

    def writer(self, shard: str) -> int:
        """Return the replica that writes a shard: the one that has most of it, or replicas in turn if all have it."""
        if not self.sharded:
            return self.stages.shards.index(shard) % self.layout.replicas
        shares = [0] * self.layout.replicas
        for run in self._all_runs:
            shares[run.owner] += (run.stop - run.start) * (run.place.shard == shard)
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
            if place.shard == shard and not self._is_tied_copy(place):
                pieces = [piece for piece in [self._send_to(writer, run) for run in runs] if piece is not None]
                if self.layout.replica == writer:
                    own[place.name] = _join_runs(pieces, self._parameters[shard, place.name].shape)
        return self._gather_parts(own) if self.layout.replica == writer else None

    def take_state(self, shard: str, stored: Mapping[str, OptimizerState]) -> None:
        """Give the optimizer its state of a shard's parameters, of which `stored` holds that of the whole."""
        cuts = family(self.stages.config).cuts
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
            return flat[run.start : run.stop].view(master.shape).to(master.device, copy=True)
        if key.startswith(_SCALES) and not run.is_whole:
            value = value[run.start // _BLOCK : math.ceil(run.stop / _BLOCK)]
        return value.to(master.device, copy=True)

    def _make_master(self, run: Run, copied: torch.dtype) -> Tensor:
        """Return what the optimizer updates: the parameter itself where that is whole and float32, else a copy."""
        parameter = self.parameter(run)
        is_apart = self._offloaded or (copied != torch.float32 and _computes_in_products(run.place.shard, parameter))
        if run.is_whole and not is_apart:
            return parameter
        values = parameter.detach()
        if not run.is_whole:
            values = values.view(-1)[run.start : run.stop]
        return values.to("cpu" if self._offloaded else values.device, copy=is_apart)

    def _gradient(self, run: Run, *, so_far: bool = True) -> Tensor:
        """Return the gradient of a run, flat, as a view; `so_far`: where gradients are shared, its sum over passes."""
        if so_far and self._shards_gradients:
            return self._sums[run]
        return gradient_of(self.parameter(run)).view(-1)[run.start : run.stop]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=next(iter(self._parameters.values())).device)

    def _global_rank(self, replica: int) -> int:
        assert self.layout.data is not None
        return dist.get_global_rank(self.layout.data, replica)

    def _publish(self) -> None:
        """Bring what the optimizer made of the masters into the parameters, on all replicas."""
        for run, master in self.masters.items():
            parameter = self.parameter(run)
            if master.data_ptr() != parameter.data_ptr() + run.start * parameter.element_size():
                parameter.view(-1)[run.start : run.stop].copy_(master.view(-1))
        if not self.sharded:
            return

        def kind(run: Run) -> tuple[int, str]:
            return run.owner, str(self.parameter(run).dtype)

        for (owner, _), runs in itertools.groupby(sorted(self._runs, key=kind), key=kind):
            for bucket in _buckets([self.parameter(run).detach().view(-1)[run.start : run.stop] for run in runs]):
                with _Flat(bucket, on_cpu=self._through_cpu) as flat:
                    dist.broadcast(flat, self._global_rank(owner), group=self.layout.data)

    def _add_tied_gradients(self) -> None:
        """With tied embeddings, give the embedding and the head's projection the sum of their gradients."""
        stages = self.stages
        if not stages.config.tie_embeddings:
            return
        kind = family(stages.config)
        keys = ((EMBED, kind.embedding_weight), (HEAD, kind.tied_weight))
        ends = [gradient_of(self._parameters[key]) for key in keys if key in self._parameters]
        if len(ends) == 2:
            ends[0].add_(ends[1])
            ends[1].copy_(ends[0])
        elif ends:
            self.layout.sum_over_ends(ends[0])

    def _is_projection(self, shard: str, name: str) -> bool:
        return shard == HEAD and name.startswith(f"{family(self.stages.config).projection}.")

    def _is_tied_copy(self, place: Place) -> bool:
        kind = family(self.stages.config)
        return self.stages.config.tie_embeddings and (place.shard, place.name) == (HEAD, kind.tied_weight)

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

    def _gather_parts(
        self, own: dict[str, tuple[Tensor, OptimizerState]]
    ) -> dict[str, tuple[Tensor, OptimizerState]] | None:
        """Return whole parameters and state on the first rank of the tensor group, None on the others."""
        group, cuts = self.layout.tensor, family(self.stages.config).cuts
        if group is None:
            return own
        first = dist.get_global_rank(group, 0)
        joined = {}

        def gather(tensor: Tensor, cut: Cut) -> Tensor:
            if cut not in ("rows", "columns"):
                return tensor
            tensor = tensor.contiguous().to(self.layout.device)
            if self.layout.tensor_rank:
                dist.gather(tensor, None, first, group=group)
                return tensor
            pieces = [torch.empty_like(tensor) for _ in range(self.layout.tensor_size)]
            dist.gather(tensor, pieces, first, group=group)
            return join_tensor([piece.cpu() for piece in pieces], cut)

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


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None, tuple(parameter.shape)
    return parameter.grad


class _Flat:
    """A bucket of tensors as one, in a context after which they have what has become of it."""

    def __init__(self, bucket: Sequence[Tensor], *, on_cpu: bool = False) -> None:
        self.bucket, self.on_cpu = bucket, on_cpu

    def __enter__(self) -> Tensor:
        flat = torch.cat([tensor.reshape(-1) for tensor in self.bucket])
        self._flat = flat.cpu() if self.on_cpu else flat
        return self._flat

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            sizes = [tensor.numel() for tensor in self.bucket]
            for tensor, part in zip(self.bucket, torch.split(self._flat, sizes), strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _computes_in_products(shard: str, parameter: Tensor) -> bool:
    """Whether layers use a parameter in products alone: a matrix, but for the embedding, whose rows are looked up.

    The gradient of an embedding adds up over tokens within one call, where half a precision would not do.
    """
    return parameter.dim() > 1 and shard != EMBED


def _list_places(stages: LocalStages) -> list[Place]:
    """Return the parameters of stages as the first part has them, so that all parts cut them into the same runs."""
    kind, config = family(stages.config), stages.config
    order = shard_names(config.num_layers)
    places = []
    for shard in stages.shards:
        shapes = dict(kind.parameter_shapes(config, shard))
        if config.tie_embeddings and shard == HEAD:
            shapes[kind.tied_weight] = (config.vocab_size, config.hidden_size)
        for name, shape in shapes.items():
            cut = kind.cuts[name]
            elements = math.prod(shape) // (stages.part.count if cut in ("rows", "columns") else 1)
            places.append(Place(shard, name, elements, order.index(shard)))
    return places


def _cut_into_runs(places: Sequence[Place], owners: int) -> list[Run]:
    """Cut all elements into one run of about as many for each owner; within a parameter, runs begin at units.

    The last unit of a parameter has the rest of it, which is less than a unit.
    """
    total = sum(place.elements for place in places)
    borders = [-(-total * owner // owners) for owner in range(1, owners)]
    runs, before = [], 0
    for place in places:
        units = max(1, place.elements // UNIT)
        inner = {math.ceil((border - before) / UNIT) for border in borders}
        cuts = [0, *sorted(unit for unit in inner if 0 < unit < units)]
        for first, last in itertools.zip_longest(cuts, cuts[1:]):
            stop = place.elements if last is None else last * UNIT
            runs.append(Run(place, first * UNIT, stop, (before + first * UNIT) * owners // total))
        before += place.elements
    return runs


def _sums_of_squares(flat: Tensor) -> Tensor:
    """Return the sum of squares of each unit and of the rest, float64; squares of a unit are added in float32."""
    units = len(flat) // UNIT
    parts = [flat[: units * UNIT].view(units, UNIT), flat[units * UNIT :].view(1, -1)]
    return torch.cat([torch.linalg.vector_norm(p, dim=1).double().square() for p in parts if p.numel()])


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
        if value.numel() == runs[0].stop - runs[0].start and value.dim():
            state[key] = torch.cat([each.reshape(-1) for each in values]).view(shape)
        elif key.startswith(_SCALES):
            state[key] = torch.cat(values)
        else:
            state[key] = value  # a count of steps, or a table that all share
    return torch.cat(masters).view(shape), state


def _to_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
