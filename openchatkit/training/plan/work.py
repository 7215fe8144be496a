"""The order of a step's work and its operations, of a planned run."""

import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from openchatkit.libraries import pytorch
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part
from openchatkit.models.family import SkipInit
from openchatkit.models.registry import family
from openchatkit.models.shards import layer_name
from openchatkit.training.plan.parameters import count_parameters
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.schedules import SCHEDULES


def list_passes(run: PlannedRun, micro_batches: int | None = None) -> Sequence[Sequence[tuple[str, int, int]]] | None:
    """Return each rank's passes of a batch, by torch's schedule: kind, stage, micro-batch.

    Kinds are those of `pytorch.list_pipeline_actions`. None where torch does not say.
    """
    number, ranks, kind = micro_batches or run.micro_batches, run.pipeline_size, SCHEDULES[run.schedule]
    if kind.takes_several:
        return pytorch.list_pipeline_actions(kind.torch_class, ranks, number, run.stages_a_rank)
    lists = []
    for rank in range(ranks):
        # As many forward passes come first as it takes until the last rank's gradient is there; in GPipe all.
        first = number if run.schedule == "gpipe" else min(number, ranks - rank)
        kinds = ["F"] * first + ["B", "F"] * (number - first) + ["B"] * first
        done = {"F": 0, "B": 0}
        passes = []
        for each in kinds:
            passes.append((each, rank, done[each]))
            done[each] += 1
        lists.append(passes)
    return lists


def list_steady_passes(run: PlannedRun, pipeline_rank: int) -> Sequence[tuple[str, int, int]] | None:
    """Return a rank's passes of only as many micro-batches as it takes to reach what all further ones repeat."""
    number, ranks = run.micro_batches, run.pipeline_size
    if number % ranks == 0:
        number = min(number, 4 * ranks)
    lists = list_passes(run, number)
    return None if lists is None else lists[pipeline_rank]


def simulate(run: PlannedRun, forward: Sequence[float], backward: Sequence[float]) -> float | None:
    """Return the seconds of a batch's way through the pipeline, from those of each stage's passes of a micro-batch.

    A pass begins when its rank is free and its input there; messages take no time. Half of a split backward is for the
    weights. None where torch does not say in which order the passes are.
    """
    if run.pipeline_size == 1:
        return run.micro_batches * (forward[0] + backward[0])
    lists = list_passes(run)
    if lists is None:
        return None
    to_input = "I" if SCHEDULES[run.schedule].splits_backward else "B"
    ends: dict[tuple[str, int, int], float] = {}
    free, places = [0.0] * len(lists), [0] * len(lists)
    while any(place < len(passes) for place, passes in zip(places, lists, strict=True)):
        for rank, passes in enumerate(lists):
            while places[rank] < len(passes):
                kind, stage, number = passes[places[rank]]
                needs = _list_needs(kind, stage, number, to_input=to_input, last=len(run.layers) - 1)
                if any(need not in ends for need in needs):
                    break
                seconds = {"F": forward[stage], "B": backward[stage]}.get(kind, backward[stage] / 2)
                free[rank] = max([free[rank], *(ends[need] for need in needs)]) + seconds
                # A list may have whole backward passes among split ones, which give their input's gradient as well.
                ends[to_input if kind == "B" else kind, stage, number] = free[rank]
                places[rank] += 1
    return max(free)


def _list_needs(kind: str, stage: int, number: int, *, to_input: str, last: int) -> list[tuple[str, int, int]]:
    """Return the passes of other stages that a pass needs to be done."""
    if kind == "W":
        return []
    if kind == "F":
        return [("F", stage - 1, number)] if stage else []
    return [("F", stage, number) if stage == last else (to_input, stage + 1, number)]


def split_passes(run: PlannedRun, layer: float, head: float) -> tuple[list[float], list[float]]:
    """Return what each stage's forward and backward pass take, from what a layer and the head take both ways together.

    The head's is all in its forward pass, since the loss computes its gradients there.
    """
    whole = [(last - first) * layer for first, last in run.layers]
    forward = [each / layer_passes(run) for each in whole]
    backward = [each - part for each, part in zip(whole, forward, strict=True)]
    forward[-1] += head
    return forward, backward


def idle_share(run: PlannedRun) -> float:
    """Return the share of a step that ranks wait in, on average, with stages as uneven as their operations are."""
    forward, backward = split_passes(run, layer_operations(run) * layer_passes(run), head_operations(run))
    seconds = simulate(run, forward, backward)
    if seconds is None:
        return bubble(run)
    return 1 - run.micro_batches * sum(forward + backward) / (run.pipeline_size * seconds)


def bubble(run: PlannedRun) -> float:
    """Return the share of a step that a rank waits in by the schedule itself, with stages that all take as long.

    Backward takes twice as long as forward, half of it for the weights (Narayanan et al., arXiv 2104.04473, section
    2.2; Qi et al., arXiv 2401.10241, section 2).
    """
    waits = (run.pipeline_size - 1) / run.stages_a_rank
    if SCHEDULES[run.schedule].splits_backward:
        waits /= 3
    return waits / (run.micro_batches + waits)


def layer_operations(run: PlannedRun) -> int:
    """Return the floating-point operations of one layer's part for a micro-batch, forward.

    Two for each weight of a matrix and token, and for each pair of tokens that see each other two in each of the two
    products of attention.
    """
    count = count_parameters(run.config, layer_name(0), Part(0, run.tensor_size))
    attention = 2 * run.seq_length * run.config.hidden_size // run.tensor_size
    return run.tokens * (2 * count.matrices + attention)


def head_operations(run: PlannedRun) -> int:
    """Return those of the head's part for a micro-batch, forward and backward: three products."""
    return run.tokens * 6 * run.config.vocab_size // run.tensor_size * run.config.hidden_size


def layer_passes(run: PlannedRun) -> float:
    """Return how often a layer's forward is worth: twice that for its backward, and what is computed again."""
    if not run.recompute:
        return 3.0
    if not run.selective:
        return 4.0
    again = sum(2 * run.tokens * width * result for width, result in list_products(run) if result > width)
    return 3 + again / layer_operations(run)


def list_products(run: PlannedRun) -> list[tuple[int, int]]:
    """Return the widths of input and result of each of a layer's products."""
    return [(layer.in_features, layer.out_features) for layer in _list_maps(run.config, run.tensor_size).values()]


def inner_widths(run: PlannedRun) -> list[int]:
    """Return how many numbers a token has within attention and within the MLP: those of their first products."""
    widths: Counter[str] = Counter()
    for name, layer in _list_maps(run.config, run.tensor_size).items():
        if family(run.config).cuts(run.config)[f"{name}.weight"] != "columns":
            widths[name.partition(".")[0]] += layer.out_features
    return list(widths.values())


@functools.lru_cache
def _list_maps(config: ModelConfig, parts: int) -> dict[str, nn.Linear]:
    """Return the linear maps of a part of a layer, in the order of its products."""
    with torch.device("meta"), SkipInit():
        layer = family(config).module(config, layer_name(0), Part(0, parts))
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def rank_operations(run: PlannedRun, pipeline_rank: int) -> int:
    """Return the operations of a rank in a step; layers that are computed again count as often as they are."""
    layer = round(layer_operations(run) * layer_passes(run))
    total = 0
    for stage in run.stages_of(pipeline_rank):
        first, last = run.layers[stage]
        total += (last - first) * layer
        total += head_operations(run) if stage == len(run.layers) - 1 else 0
    return total * run.micro_batches * run.accumulate


def head_cost(run: PlannedRun) -> float:
    """Return the head's operations in units of those of a layer, for `balanced_layers`."""
    return head_operations(run) / (layer_operations(run) * layer_passes(run))
