"""Float32 gradients of a rank's parameters: added up over passes, the tensor group, tied ends and replicas.

All of them are views of one buffer, so that a message between replicas is a slice of it. Gradients that a backward pass
is done with for the last time in a step are sent while it goes on with others. Messages have one order, the same on all
replicas, whatever is ready first: later layers before earlier ones, and at the end what has to be added up over other
ranks before.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openchatkit.distributed.layout import Layout
from openchatkit.libraries import pytorch
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, layer_number
from openchatkit.training.buckets import BUCKET, Flat, gather_buckets
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.runs import UNIT, Run, is_counted_elsewhere, is_of_all_layers

Key = tuple[str, str]  # shard and name of a parameter


class Gradients:
    """Gradients of the parameters by shard and name; `runs` are all of these, in the order of the data's flow.

    `owner` is the replica whose runs this one updates, None where it updates all. `keeps_own`: gradients are added over
    replicas as soon as a backward pass has them, and those of own runs alone are kept (ZeRO-2). `through_cpu`: replicas
    exchange by gloo on the CPU. `bucket` is the number of elements that one message takes, unless a run has more.
    """

    def __init__(
        self,
        stages: LocalStages,
        layout: Layout,
        parameters: Mapping[Key, nn.Parameter],
        runs: Sequence[Run],
        *,
        owner: int | None,
        keeps_own: bool,
        through_cpu: bool,
        bucket: int = BUCKET,
    ) -> None:
        self.stages, self.layout, self.parameters, self.runs = stages, layout, parameters, runs
        self._bucket_elements = bucket
        self._owner, self._keeps_own, self._through_cpu = owner, keeps_own, through_cpu
        self._cuts = family(stages.config).cuts(stages.config)
        self.own = [run for run in runs if owner in (None, run.owner)]
        early, late = self._part_by_lateness()
        kept = self.own if keeps_own else [*early, *late]
        first = next(iter(parameters.values()))
        # That of all: float32, but for a model in float64, which others are compared with.
        dtype = pytorch.gradient_dtype(first)
        self._buffer = torch.zeros(sum(run.elements for run in kept), dtype=dtype, device=first.device)
        self._views = dict(zip(kept, torch.split(self._buffer, [run.elements for run in kept]), strict=True))
        self._ready: dict[Key, Tensor] = {}  # gradients that are to be added to those of own runs
        self._buckets: list[_Bucket] = []  # in the order in which they are sent
        self._sent = 0  # of these
        if keeps_own:
            assert not stages.config.tie_embeddings, "their gradients belong to two parameters"
            assert not any(is_of_all_layers(stages, run.place) for run in runs), "and these to one of each layer"
            self._call_after_passes(self._collect)
            return
        self._attach()
        if layout.data is not None:
            self._buckets = [*self._make_buckets(early, late=False), *self._make_buckets(late, late=True)]

    def of(self, run: Run) -> Tensor:
        """Return the gradient of a run, flat, as a view; with `keeps_own` of own runs alone."""
        return self._views[run]

    def expect_passes(self, passes: int) -> None:
        """Send gradients after so many backward passes in a step, before the step's end. Call it once.

        Passes count where autograd adds gradients up, as it does unless a schedule splits backward passes.
        """
        if self.layout.data is None or self._keeps_own or self._through_cpu:
            return
        of_parameter: dict[Key, list[_Bucket]] = {}
        for bucket in self._buckets:
            for run in () if bucket.is_late else bucket.runs:
                of_parameter.setdefault(run.place.key, []).append(bucket)
                bucket.passes += passes
        counted = {key: self.parameters[key] for key in of_parameter}

        def count(key: Key, _: Tensor) -> None:
            for bucket in of_parameter[key]:
                bucket.passes_left -= 1
                assert bucket.passes_left >= 0, f"a backward pass of {key} after its gradient was sent"
            self._send(only_ready=True)

        self._call_after_passes(count, counted)
        self._start_counting()

    @torch.no_grad()
    def reduce(self) -> None:
        """Add gradients over parts, what layers or tied ends share, and replicas; if sharded, to the owners."""
        if self._keeps_own:
            # Those of the projection are left, which the loss writes; without a trained token there are none.
            for key in filter(self._is_projection, self.parameters):
                parameter = self.parameters[key]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=pytorch.gradient_dtype(parameter))
                self._take(key)
            self._reduce_ready()
            self._add_over_parts(self.own)
            return
        for key, start in self._starts.items():
            assert gradient_of(self.parameters[key]).data_ptr() == start, key
        self._send(early_only=True)
        self._add_over_parts(self.runs)
        self._add_tied()
        tables = {run.place.key for run in self.runs if is_of_all_layers(self.stages, run.place)}
        add_over_layers(self.stages, self.layout, {key: gradient_of(self.parameters[key]) for key in tables})
        self._send()
        for bucket in self._buckets:
            bucket.wait()

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each shard's gradient in float64 [num_layers + 2], 0 for those of other ranks.

        In a tensor group, each rank counts its own part, and the first what all have: their sum is the whole norm.
        Sums of units are added in the order of the data's flow, so that the bits are the same over any stages and runs.
        """
        counted = set(self.own) if self.stages.part.index == 0 else set(filter(self._is_cut, self.own))
        counted -= {run for run in self.own if is_counted_elsewhere(self.stages, run.place)}
        norms = iter(norms_of_units([self.of(run) for run in self.runs if run in counted]))
        sums = [next(norms).double().square() if run in counted else self._zeros(run.units) for run in self.runs]
        flat = torch.cat(sums) if sums else self._zeros(0)
        if self._owner is not None:
            self.layout.sum_over_replicas(flat)  # of which all but one have zeros
        shards = self._zeros(self.stages.config.num_layers + 2)
        parts = zip(self.runs, torch.split(flat, [run.units for run in self.runs]), strict=True)
        for number, of_shard in itertools.groupby(parts, key=lambda pair: pair[0].place.shard_number):
            shards[number] = torch.cat([each for _, each in of_shard]).sum()
        return shards

    def clear(self) -> None:
        """Start the sums of the next step."""
        self._buffer.zero_()
        self._start_counting()

    def _attach(self) -> None:
        """Let autograd add each parameter's gradient to its place in the buffer.

        torch.compile refuses a parameter whose gradient is of another dtype. A compiled layer's comes to the buffer
        after each pass.
        """
        self._starts: dict[Key, int] = {}  # of gradients that are in the buffer
        wholes: dict[Key, Tensor] = {}  # places in the buffer of the others
        for key, runs in itertools.groupby(self._views, key=lambda run: run.place.key):
            views = [self._views[run] for run in runs]
            parameter = self.parameters[key]
            first = views[0].storage_offset()
            whole = self._buffer[first : first + parameter.numel()]
            if self.stages.is_compiled and key[0] not in (EMBED, HEAD) and parameter.dtype != whole.dtype:
                wholes[key] = whole.view_as(parameter)
            else:
                parameter.grad = whole.view_as(parameter)
                self._starts[key] = whole.data_ptr()

        @torch.no_grad()
        def add(key: Key, parameter: Tensor) -> None:
            wholes[key].add_(gradient_of(parameter))
            parameter.grad = None

        if wholes:
            self._call_after_passes(add, {key: self.parameters[key] for key in wholes})

    def _make_buckets(self, runs: Sequence[Run], *, late: bool) -> list["_Bucket"]:
        """Return runs that follow each other in the buffer as messages to their owners, those of later layers first."""
        parts = [
            _Bucket(part, late=late)
            for _, of_owner in itertools.groupby(runs, key=lambda run: run.owner)
            for part in gather_buckets(of_owner, lambda run: run.elements, self._bucket_elements)
        ]
        return parts[::-1]

    def _part_by_lateness(self) -> tuple[list[Run], list[Run]]:
        """Return the runs that can be sent before a step's end, and the others.

        Late are those that the loss writes, that are first added up over the tensor group, or that layers or tied ends
        share.
        """
        kind = family(self.stages.config)
        tied = (
            {(EMBED, kind.embedding_weight), (HEAD, kind.tied_weight)} if self.stages.config.tie_embeddings else set()
        )

        def is_late(run: Run) -> bool:
            over_parts = self.layout.tensor is not None and not self._is_cut(run)
            shared = run.place.key in tied or is_of_all_layers(self.stages, run.place)
            return over_parts or shared or self._is_projection(run.place.key)

        return [run for run in self.runs if not is_late(run)], [run for run in self.runs if is_late(run)]

    def _is_cut(self, run: Run) -> bool:
        """Whether each rank of a tensor group has its own part of a parameter, or it alone has it."""
        return self._cuts[run.place.name] != "whole"

    def _is_projection(self, key: Key) -> bool:
        return key[0] == HEAD and key[1].startswith(f"{family(self.stages.config).projection}.")

    def _call_after_passes(
        self, hook: Callable[[Key, Tensor], None], parameters: Mapping[Key, nn.Parameter] | None = None
    ) -> None:
        for key, parameter in (parameters or self.parameters).items():
            parameter.register_post_accumulate_grad_hook(functools.partial(hook, key))  # type: ignore[no-untyped-call]

    def _start_counting(self) -> None:
        self._sent = 0
        for bucket in self._buckets:
            bucket.passes_left = bucket.passes

    def _send(self, *, only_ready: bool = False, early_only: bool = False) -> None:
        """Send buckets in their order: all that are left, or up to the first that is not ready, or is late."""
        for bucket in self._buckets[self._sent :]:
            if (only_ready and (bucket.is_late or bucket.passes_left > 0)) or (early_only and bucket.is_late):
                return
            first = self._views[bucket.runs[0]].storage_offset()
            flat = self._buffer[first : first + sum(run.elements for run in bucket.runs)]
            bucket.work = self._add_over_replicas(flat, bucket.runs[0].owner)
            self._sent += 1

    def _add_over_replicas(self, flat: Tensor, owner: int) -> "dist.Work | None":
        """Start to add a tensor over replicas, to the owner if there is one; returns what to wait for."""
        sent = flat.cpu() if self._through_cpu else flat
        work: dist.Work | None
        if self._owner is None:
            work = dist.all_reduce(sent, group=self.layout.data, async_op=not self._through_cpu)
        else:
            assert self.layout.data is not None
            rank = dist.get_global_rank(self.layout.data, owner)
            work = dist.reduce(sent, rank, group=self.layout.data, async_op=not self._through_cpu)
        if self._through_cpu:
            flat.copy_(sent)
        return work

    def _add_over_parts(self, runs: Sequence[Run]) -> None:
        if self.layout.tensor is None:
            return
        for bucket in gather_buckets([self.of(run) for run in runs if not self._is_cut(run)], Tensor.numel):
            with Flat(bucket) as flat:
                dist.all_reduce(flat, group=self.layout.tensor)

    def _add_tied(self) -> None:
        """With tied embeddings, give the embedding and the head's projection the sum of their gradients."""
        stages, kind = self.stages, family(self.stages.config)
        if not stages.config.tie_embeddings:
            return
        keys = ((EMBED, kind.embedding_weight), (HEAD, kind.tied_weight))
        ends = [gradient_of(self.parameters[key]) for key in keys if key in self.parameters]
        if len(ends) == 2:
            ends[0].add_(ends[1])
            ends[1].copy_(ends[0])
        elif ends:
            self.layout.sum_over_ends(ends[0])

    def _collect(self, key: Key, _: Tensor) -> None:
        """Take a gradient that a backward pass is done with; some together are worth a message."""
        self._take(key)
        if sum(gradient.numel() for gradient in self._ready.values()) >= self._bucket_elements:
            self._reduce_ready()

    @torch.no_grad()
    def _take(self, key: Key) -> None:
        """Take a parameter's gradient from it: torch.compile would refuse one of another dtype than the parameter."""
        gradient, self.parameters[key].grad = gradient_of(self.parameters[key]), None
        if key in self._ready:
            self._ready[key].add_(gradient)
        else:
            self._ready[key] = gradient

    @torch.no_grad()
    def _reduce_ready(self) -> None:
        """Add ready gradients over replicas, keep the sums of own runs, and free the rest.

        Backward passes of all replicas come to their gradients in the same order, and so do these messages.
        """
        runs = [run for run in self.runs if run.place.key in self._ready]
        for owner, of_owner in itertools.groupby(runs, key=lambda run: run.owner):
            owned = list(of_owner)
            for bucket in gather_buckets([self._new_gradient(run) for run in owned], Tensor.numel):
                with Flat(bucket) as flat:
                    work = self._add_over_replicas(flat, owner)
                    if work is not None:
                        work.wait()
            for run in owned if owner == self._owner else ():
                self.of(run).add_(self._new_gradient(run))
        self._ready.clear()

    def _new_gradient(self, run: Run) -> Tensor:
        return self._ready[run.place.key].view(-1)[run.start : run.stop]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self._buffer.device)


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None, tuple(parameter.shape)
    return parameter.grad


@torch.no_grad()
def add_over_layers(stages: LocalStages, layout: Layout, gradients: Mapping[Key, Tensor]) -> None:
    """Give each copy of a matrix that all layers have in common the sum of the copies' gradients over the model.

    `gradients` are those of this rank's copies. They are added in the order of layers, so that the bits are the same
    over any stages. Every rank of a pipeline calls it together.
    """
    names = sorted({name for _, name in gradients})
    for name in names:
        own = {layer_number(shard): gradient for (shard, other), gradient in gradients.items() if other == name}
        some = next(iter(own.values()))
        all_layers = torch.zeros(stages.config.num_layers, *some.shape, dtype=some.dtype, device=some.device)
        for number, gradient in own.items():
            all_layers[number] = gradient
        layout.sum_over_pipeline(all_layers)
        total = all_layers.sum(0)
        for gradient in own.values():
            gradient.copy_(total)


class _Bucket:
    """Runs of one owner that follow each other in the buffer, sent together; `passes` of all of them together."""

    def __init__(self, runs: Sequence[Run], *, late: bool) -> None:
        self.runs, self.is_late = runs, late
        self.passes, self.passes_left = 0, 1
        self.work: dist.Work | None = None

    def wait(self) -> None:
        """Wait until the sum is there; on a GPU, let what follows on it wait."""
        if self.work is not None:
            self.work.wait()
            self.work = None


def norms_of_units(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of each flat gradient's units, and of the rest, in float32 [units]."""
    rests = [gradient[len(gradient) // UNIT * UNIT :] for gradient in gradients]
    of_rests = iter(torch._foreach_norm([rest for rest in rests if len(rest)]) if any(map(len, rests)) else ())
    norms = []
    for gradient, rest in zip(gradients, rests, strict=True):
        whole = gradient[: len(gradient) - len(rest)].view(-1, UNIT)
        parts = [torch.linalg.vector_norm(whole, dim=1)] if len(whole) else []
        if len(rest):
            parts.append(next(of_rests).view(1))
        norms.append(torch.cat(parts))
    return norms
