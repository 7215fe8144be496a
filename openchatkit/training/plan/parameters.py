"""Parameters of a shard and of a rank, counted from the modules themselves, cut as `Family.cuts` says."""

import functools
from dataclasses import dataclass

import torch

from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part, is_in
from openchatkit.models.family import SkipInit
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, layer_name
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.runs import UNIT


@dataclass(frozen=True)
class ParameterCount:
    """Elements of a shard's parameters in one part of it.

    `matrices` are those that layers use in products alone (no tables, as the embedding is), `uncut` those whose
    gradients parts add up, `small` those of parameters too small for 8-bit moments, `vectors` those of biases and
    norms. `lines` counts their rows and columns, of a vector its elements; `largest` is the largest parameter.
    """

    elements: int = 0
    matrices: int = 0
    uncut: int = 0
    small: int = 0
    vectors: int = 0
    lines: int = 0
    largest: int = 0

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        return ParameterCount(
            self.elements + other.elements,
            self.matrices + other.matrices,
            self.uncut + other.uncut,
            self.small + other.small,
            self.vectors + other.vectors,
            self.lines + other.lines,
            max(self.largest, other.largest),
        )

    def times(self, number: int) -> "ParameterCount":
        """Return the count of that many such shards."""
        sums = {name: number * value for name, value in vars(self).items()}
        return ParameterCount(**sums | {"largest": self.largest if number else 0})


def count_parameters(config: ModelConfig, shard: str, part: Part) -> ParameterCount:
    """Count the parameters of a part of a shard, from its module.

    All layers are alike, and so are all parts but the first.
    """
    kind = shard if shard in (EMBED, HEAD) else layer_name(0)
    return _count_kind(config, kind, Part(min(part.index, 1), part.count))


@functools.lru_cache
def _count_kind(config: ModelConfig, shard: str, part: Part) -> ParameterCount:
    kind = family(config)
    cuts = kind.cuts(config)
    with torch.device("meta"), SkipInit():
        parameters = dict(kind.module(config, shard, part).named_parameters())
    assert all(is_in(part, cuts[name]) for name in parameters), (shard, part)
    count = ParameterCount()
    for name, parameter in parameters.items():
        size = parameter.numel()
        is_table = shard == EMBED or name in kind.of_all_layers
        matrix = size if parameter.dim() > 1 and not is_table else 0
        uncut, small = (size if cuts[name] == "whole" else 0), (size if size < UNIT else 0)
        vector = size if parameter.dim() == 1 else 0
        count += ParameterCount(size, matrix, uncut, small, vector, lines=sum(parameter.shape), largest=size)
    return count


def count_rank(run: PlannedRun, pipeline_rank: int, tensor_rank: int = 0) -> ParameterCount:
    """Count the parameters of a rank."""
    part = Part(tensor_rank, run.tensor_size)
    total = ParameterCount()
    for stage in run.stages_of(pipeline_rank):
        first, last = run.layers[stage]
        total += count_parameters(run.config, layer_name(0), part).times(last - first)
        for shard in {EMBED, HEAD} & {*run.shards_of(stage)}:
            total += count_parameters(run.config, shard, part)
    return total
