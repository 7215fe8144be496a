"""The speed and memory of a run as predicted from a moment's measure of its layers, and what became of them.

Layers, the optimizer's update and sums over replicas are measured as they are in the run, on all ranks at once; the
plan says how often each comes and what waits for what. Messages between stages are taken to cost nothing.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from openchatkit.distributed.layout import Layout
from openchatkit.loading import hardware
from openchatkit.models.cuts import Part
from openchatkit.models.dropout import row_keys
from openchatkit.models.stage import Stage
from openchatkit.training.buckets import Flat
from openchatkit.training.config import Settings
from openchatkit.training.fit import identify_host
from openchatkit.training.forecast import MEASURED_STEPS
from openchatkit.training.local_stages import LocalStages, join_parts
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.plan import work
from openchatkit.training.plan.memory import rank_bytes
from openchatkit.training.plan.parameters import count_rank
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.traffic import rank_traffic
from openchatkit.training.precision import autocast
from openchatkit.training.weights import Weights

_GIB = 1 << 30
_SMALL = 200 << 20  # bytes, of which what a process itself takes is no small part
_SHORT_SECONDS = 0.3  # a pass that takes longer is not repeated
_REPEATS = 3
_PROBE = 1 << 22  # elements of a sum over replicas


@dataclass(frozen=True)
class PartSeconds:
    """Seconds of parts of a step on a rank, while all ranks compute.

    `layer` and `head` are of a micro-batch, forward and backward; `update` of an element that the optimizer updates,
    `reduced` of a byte of gradients that is added over replicas.
    """

    layer: float
    head: float
    update: float
    reduced: float


class Prediction:
    """Speed and memory that a run is expected to have, and how its first steps compare; of all ranks together."""

    def __init__(self, settings: Settings, plan: PlannedRun, layout: Layout) -> None:
        self._layout, self._plan = layout, plan
        self._held = rank_bytes(plan, layout.pipeline_rank, layout.tensor_rank).total
        self._before = _find_allocated(layout.device)
        self._found = 0  # most bytes that steps took
        self._seconds: list[float] = []
        measured = layout.gather(measure_parts(settings, plan, layout))
        mean = PartSeconds(
            *(
                sum(getattr(each, name) for each in measured) / len(measured)
                for name in ("layer", "head", "update", "reduced")
            )
        )
        self._predicted = plan.step_tokens / predict_step(plan, mean, crowding=_find_crowding(layout))
        if layout.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(layout.device)
        needs = layout.gather(self._held)
        if layout.rank == 0:
            logger.info(
                "to be expected: {:,.0f} tokens/s, and {:.2f} GiB on the fullest rank",
                self._predicted,
                max(needs) / _GIB,
            )

    def add(self, seconds: float, *, saved: bool) -> None:
        """Add a step of this rank; after the first ones, log what was predicted and what was measured.

        `saved`: a save has been begun, whose copies and buffers on a CPU would count as memory of steps.
        """
        self._seconds.append(seconds)
        if not saved:
            self._found = _find_allocated(self._layout.device) - self._before
        if len(self._seconds) != MEASURED_STEPS:
            return
        pairs = self._layout.gather((self._held, self._found))
        if self._layout.rank == 0:
            # The first step also allocates memory and starts threads.
            measured = self._plan.step_tokens * (MEASURED_STEPS - 1) / sum(self._seconds[1:])
            expected, found = max(pairs, key=lambda pair: pair[0])
            memory = ""
            if found > _SMALL:
                memory = (
                    f"; {found / _GIB:.2f} GiB on the fullest rank, predicted {expected / _GIB:.2f} "
                    f"({expected / found - 1:+.0%})"
                )
            logger.info(
                "after {} steps: {:,.0f} tokens/s, predicted {:,.0f} ({:+.0%}){}",
                MEASURED_STEPS,
                measured,
                self._predicted,
                self._predicted / measured - 1,
                memory,
            )


def make_prediction(settings: Settings, plan: PlannedRun, layout: Layout, *, total_steps: int) -> Prediction | None:
    """Return the prediction of a run; None for one that is over before it is compared, or whose layers are compiled.

    Compiling takes longer than the moment that a measure may take.
    """
    if total_steps < MEASURED_STEPS or settings.compile is not None:
        return None
    return Prediction(settings, plan, layout)


def predict_step(plan: PlannedRun, seconds: PartSeconds, *, crowding: float = 1.0) -> float:
    """Return the seconds of a step.

    `crowding` is how many threads of ranks share a core, at least 1: a rank that waits leaves its share to the others.
    """
    forward, backward = work.split_passes(plan, seconds.layer / crowding, seconds.head / crowding)
    busy = plan.micro_batches * sum(forward + backward) / plan.pipeline_size
    alone = work.simulate(plan, forward, backward)
    if alone is None:
        alone = busy / (1 - work.bubble(plan))
    batch = max(alone, crowding * busy)
    shared = plan.replicas if plan.dp_mode != "allreduce" else 1
    ranks = range(plan.pipeline_size)
    update = max(count_rank(plan, rank).elements for rank in ranks) / shared * seconds.update
    reduced = max(rank_traffic(plan, rank)["data"].bytes for rank in ranks) * seconds.reduced
    return plan.accumulate * batch + update + reduced


def measure_parts(settings: Settings, plan: PlannedRun, layout: Layout) -> PartSeconds:
    """Measure a layer, the head, an update and a sum; all ranks call this together."""
    dtype, device = hardware.DTYPES[plan.precision], layout.device
    hidden_parts = plan.tensor_size if plan.sequence_parallel else 1
    shape = (plan.micro_batch_size, plan.seq_length // hidden_parts, plan.config.hidden_size)
    labels = torch.zeros(plan.micro_batch_size, plan.seq_length, dtype=torch.int64)
    starts = torch.zeros_like(labels) if plan.documents else None
    keys = row_keys(0, 0, len(labels)) if plan.config.options.drops_out else None

    def measure(*, head: bool) -> tuple[float, float]:
        stage = _make_stage(plan, layout, head=head)
        stages = LocalStages({0: stage})
        weights = Weights(stages, Layout(0, device), dtype=dtype, offloaded=plan.offload)
        weights.optimizer = build_optimizer(
            settings.optimizer,
            weights,
            lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=0.0,
            moments=plan.moments,
            momentum=settings.momentum,
        )
        loss: Callable[[Tensor], Tensor] = torch.sum
        if head:
            first = stages.part.first(plan.config.vocab_size)
            vocabulary_loss = VocabularyLoss(stage.projection, group=layout.tensor, first=first)
            loss = lambda hidden: vocabulary_loss(hidden, labels)  # noqa: E731
        hidden = torch.zeros(shape, dtype=dtype, device=device)

        def compute() -> None:
            result = stage(hidden.detach().requires_grad_(), starts, dropout_keys=keys)
            loss(result).backward()  # type: ignore[no-untyped-call]

        def update() -> None:
            weights.squared_norms()
            weights.step(1.0, 0.0)
            weights.drop_gradients()

        with autocast(device, dtype):
            passed = _time(compute, layout)
        elements = sum(parameter.numel() for parameter in stage.parameters())
        return passed, _time(update, layout) / elements

    layer, update = measure(head=False)
    head, _ = measure(head=True)
    reduced = _measure_reduction(plan, layout, through_cpu=settings.sends_through_cpu(layout.device))
    return PartSeconds(layer, head, update, reduced)


def _make_stage(plan: PlannedRun, layout: Layout, *, head: bool) -> Stage:
    part = Part(layout.tensor_rank, layout.tensor_size)
    with torch.device("meta"):
        stage = Stage(
            plan.config,
            0,
            0 if head else 1,
            embed=False,
            head=head,
            recompute=plan.recompute,
            selective=plan.selective,
            part=part,
        )
    stage.to_empty(device=layout.device)
    stage.init_weights(0)
    join_parts(stage, layout, splits_tokens=plan.sequence_parallel)
    return stage


def _measure_reduction(plan: PlannedRun, layout: Layout, *, through_cpu: bool) -> float:
    """Return the seconds of a byte in a sum over replicas, or in a reduction to one of them, as `Weights` sends it."""
    if layout.data is None:
        return 0.0
    size = min(_PROBE, count_rank(plan, layout.pipeline_rank).elements)
    numbers = torch.zeros(size, device=layout.device)
    first = dist.get_global_rank(layout.data, 0)

    def reduce() -> None:
        with Flat([numbers], on_cpu=through_cpu) as flat:
            if plan.dp_mode == "allreduce":
                dist.all_reduce(flat, group=layout.data)
            else:
                dist.reduce(flat, first, group=layout.data)

    return _time(reduce, layout) / numbers.nbytes


def _time(run: Callable[[], None], layout: Layout) -> float:
    """Return the seconds of the fastest of some runs on all ranks at once; of the first one if that takes long."""

    def once() -> float:
        hardware.synchronize(layout.device)
        started = time.perf_counter()
        run()
        hardware.synchronize(layout.device)
        return time.perf_counter() - started

    first = once()
    if max(layout.gather(first)) > _SHORT_SECONDS:
        return first
    layout.barrier()
    return min(once() for _ in range(_REPEATS))


def _find_crowding(layout: Layout) -> float:
    """Return how many threads of this host's ranks there are for each core, at least 1; GPUs share nothing."""
    hosts = layout.gather(identify_host())
    if layout.device.type != "cpu":
        return 1.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, hosts.count(hosts[layout.rank]) * torch.get_num_threads() / cores)


def _find_allocated(device: torch.device) -> int:
    """Return the most bytes that tensors took on a GPU, or this process on a CPU, which gives none back."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else hardware.main_memory_in_use()
