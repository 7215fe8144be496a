"""Memory, messages and operations of a run, computed from its layout and the model's config.json before it starts.

Owns what a rank holds and sends; how long that takes on which machines is the planning command's. Shapes come from the
modules themselves, cut as `Family.cuts` says, and the order of work from torch's schedules. Nothing is measured here.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from openchatkit.distributed.layout import stage_numbers
from openchatkit.libraries import pytorch
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part, is_in
from openchatkit.models.family import SkipInit
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, layer_name
from openchatkit.training.loss import CHUNK_TOKENS
from openchatkit.training.schedules import SCHEDULES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUCKET = 1 << 25  # elements that replicas reduce at a time
SMALLEST_8_BIT = 4096  # elements of a parameter from which on bitsandbytes keeps its moments in 8 bits


@dataclass(frozen=True)
class StateBytes:
    """Bytes of training state for each element of a parameter, but for the optimizer's moments."""

    weight: float
    gradient: float
    master: float


# The one source of the bytes of a parameter, the design of `training.weights`: layers compute with half-precision
# copies of their matrices, and everything else is float32. Where a parameter is float32, it is its own master.
# With --dp-mode sharded, masters and moments are divided by the number of replicas.
STATE = {
    ("matrix", "half"): StateBytes(weight=2, gradient=4, master=4),
    ("matrix", "float32"): StateBytes(weight=4, gradient=4, master=0),
    ("other", "half"): StateBytes(weight=4, gradient=4, master=0),
    ("other", "float32"): StateBytes(weight=4, gradient=4, master=0),
}
# Two float32 moments, or two of 8 bits with a float32 scale for each block of 256.
MOMENTS = {"adam": 8.0, "adamw": 8.0, "8bit-adam": 2 + 2 * 4 / 256}


@dataclass(frozen=True)
class ParameterCount:
    """Elements of a shard's parameters in one part of it.

    `matrices` are those that layers use in products alone (not the embedding), `uncut` those whose gradients parts add
    up, `small` those of parameters too small for 8-bit moments; `largest` is the largest parameter.
    """

    elements: int = 0
    matrices: int = 0
    uncut: int = 0
    small: int = 0
    largest: int = 0

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        return ParameterCount(
            self.elements + other.elements,
            self.matrices + other.matrices,
            self.uncut + other.uncut,
            self.small + other.small,
            max(self.largest, other.largest),
        )

    def times(self, number: int) -> "ParameterCount":
        """Return the count of that many such shards."""
        elements, matrices, uncut, small = (
            number * each for each in (self.elements, self.matrices, self.uncut, self.small)
        )
        return ParameterCount(elements, matrices, uncut, small, self.largest if number else 0)


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A model and how it would be trained. `layers` are each stage's first and last (exclusive) layers.

    `micro_batches` go through a pipeline at a time, and a step takes `accumulate` times as many. `selective` is of what
    is computed again (see `models.recompute`). `on_gpu`: autocast widens the input of norms on a GPU, which then is
    kept in float32.
    """

    config: ModelConfig
    layers: tuple[tuple[int, int], ...]
    pipeline_size: int = 1
    replicas: int = 1
    tensor_size: int = 1
    schedule: str = "gpipe"
    micro_batches: int = 1
    micro_batch_size: int = 1
    accumulate: int = 1
    seq_length: int = 2048
    precision: str = "bfloat16"
    recompute: bool = True
    selective: bool = False
    dp_mode: str = "allreduce"
    optimizer: str = "adamw"
    on_gpu: bool = True

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline_size * self.replicas * self.tensor_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all replicas."""
        return self.tokens * self.micro_batches * self.accumulate * self.replicas

    @property
    def stages_a_rank(self) -> int:
        """Number of stages on each rank."""
        return len(self.layers) // self.pipeline_size

    @property
    def width(self) -> int:
        """Bytes of a number of the hidden states."""
        return DTYPES[self.precision].itemsize

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states: of a message between stages, and of a sum over parts."""
        return self.tokens * self.config.hidden_size * self.width

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """Return the numbers of a rank's stages."""
        return stage_numbers(
            pipeline_rank,
            pipeline_size=self.pipeline_size,
            stages_a_rank=self.stages_a_rank,
            v_shaped=SCHEDULES[self.schedule].v_shaped,
        )

    def shards_of(self, stage: int) -> list[str]:
        """Return the shards of a stage."""
        first, last = self.layers[stage]
        embed, head = stage == 0, stage == len(self.layers) - 1
        return [EMBED] * embed + [layer_name(number) for number in range(first, last)] + [HEAD] * head


@dataclass(frozen=True)
class RankBytes:
    """Bytes that a rank holds, by kind, at the fullest moment of a step.

    `moments` are the optimizer's; `working` memory is that of one layer's backward, or of a bucket of gradients if
    that is more than all that goes with the micro-batches.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    activations: float
    receive_buffers: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return math.fsum(vars(self).values())


@dataclass(frozen=True)
class Traffic:
    """Messages of a step that a rank sends, or collectives that it takes part in, and the bytes of their tensors."""

    messages: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)


def count_parameters(config: ModelConfig, shard: str, part: Part) -> ParameterCount:
    """Count the parameters of a part of a shard, from its module.

    All layers are alike, and so are all parts but the first.
    """
    kind = shard if shard in (EMBED, HEAD) else layer_name(0)
    return _count_kind(config, kind, Part(min(part.index, 1), part.count))


@functools.lru_cache
def _count_kind(config: ModelConfig, shard: str, part: Part) -> ParameterCount:
    kind = family(config)
    with torch.device("meta"), SkipInit():
        parameters = dict(kind.module(config, shard, part).named_parameters())
    assert all(is_in(part, kind.cuts[name]) for name in parameters), (shard, part)
    count = ParameterCount()
    for name, parameter in parameters.items():
        size = parameter.numel()
        matrix = size if parameter.dim() > 1 and shard != EMBED else 0
        uncut, small = (size if kind.cuts[name] == "whole" else 0), (size if size < SMALLEST_8_BIT else 0)
        count += ParameterCount(size, matrix, uncut, small, size)
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


def rank_bytes(run: PlannedRun, pipeline_rank: int, tensor_rank: int = 0) -> RankBytes:
    """Return the bytes of a rank."""
    count = count_rank(run, pipeline_rank, tensor_rank)
    computes = "float32" if run.precision == "float32" else "half"
    sizes = {"matrix": count.matrices, "other": count.elements - count.matrices}
    share = run.replicas if run.dp_mode == "sharded" else 1

    def add_up(field: str) -> float:
        return sum(size * float(getattr(STATE[kind, computes], field)) for kind, size in sizes.items())

    moments = (count.elements - count.small) * MOMENTS[run.optimizer] + count.small * MOMENTS["adamw"]
    stages = run.stages_of(pipeline_rank)
    kept = {stage: kept_bytes(run, stage) for stage in stages}
    activations = peak(run, pipeline_rank, kept, {stage: pending_bytes(run, stage) for stage in stages})
    buffers = sum(receive_bytes(run, stage) for stage in stages)
    logits = logits_bytes(run) if len(run.layers) - 1 in stages else 0
    working = float(_working_bytes(run, count))
    if run.replicas > 1:
        # Gradients are reduced when all micro-batches have passed.
        working = max(working, 4 * max(min(count.elements, BUCKET), count.largest) - activations)
    return RankBytes(
        weights=add_up("weight"),
        gradients=add_up("gradient"),
        masters=add_up("master") / share,
        moments=moments / share,
        activations=activations,
        receive_buffers=buffers,
        logits=logits,
        working=working,
    )


def layer_bytes(run: PlannedRun) -> int:
    """Return the bytes that one layer keeps of a micro-batch for its backward, but for its input.

    Normed inputs, queries, keys and values (before and after rotation), attention's results and their sums of
    exponentials, and the MLP's two inner states; masks of documents are not counted. A GPU's attention keeps one of the
    two results that a CPU's keeps.
    """
    config, parts = run.config, run.tensor_size
    hidden, attention, inner = config.hidden_size, config.hidden_size // parts, config.intermediate_size // parts
    norms = 2 if config.family == "gpt_neox" else 1
    # GPT-NeoX keeps queries, keys and values in one matrix, whose values alone are used in the end.
    states = norms * hidden + (7 if config.family == "gpt_neox" else 5) * attention + 2 * inner
    serial = config.family == "gpt_neox" and not config.parallel_residual
    # A serial layer's second norm is given a state of its own; a GPU's norms all are, and in float32.
    wide = norms * hidden * 4 if _widens_norms(run) else serial * hidden * run.width
    statistics = 4 * (2 * norms + config.num_heads // parts)
    return run.tokens * (states * run.width + wide + statistics)


def _list_products(run: PlannedRun) -> list[tuple[int, int]]:
    """Return the widths of input and result of each of a layer's products."""
    hidden, parts = run.config.hidden_size, run.tensor_size
    attention, inner = hidden // parts, run.config.intermediate_size // parts
    first = [(hidden, 3 * attention)] if run.config.family == "gpt_neox" else 3 * [(hidden, attention)]
    return [*first, (attention, hidden), (hidden, inner), (inner, hidden)]


def _choose_kept_products(run: PlannedRun) -> list[tuple[int, int]]:
    """Return the products that are not computed again, as `models.recompute` chooses them."""
    return [(width, result) for width, result in _list_products(run) if run.selective and result <= width]


def _saved_result_bytes(run: PlannedRun) -> int:
    """Return the bytes that a layer keeps besides its input where it is computed again."""
    if not run.selective:
        return 0
    attention, heads = run.config.hidden_size // run.tensor_size, run.config.num_heads // run.tensor_size
    return run.tokens * ((sum(result for _, result in _choose_kept_products(run)) + attention) * run.width + 4 * heads)


def kept_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes that a stage keeps of a micro-batch from its forward to its backward.

    The input of a stage after the first is in a receive buffer, and not counted here.
    """
    first, last = run.layers[stage]
    layers, received = last - first, 1 if stage else 0
    # A layer that is not computed again needs its input for its norms, which on a GPU have a copy of their own.
    inputs = 0 if _widens_norms(run) and not run.recompute else max(layers - received, 0)
    inner = _saved_result_bytes(run) if run.recompute else layer_bytes(run)
    kept = inputs * run.hidden_bytes + layers * inner
    if stage < len(run.layers) - 1:
        return kept + run.hidden_bytes  # the stage's result, while it is sent, and until its gradient comes
    # The head's norm keeps its input and two numbers a token, the stage its result, and the loss the result's gradient.
    wide = run.tokens * run.config.hidden_size * (4 if _widens_norms(run) else run.width)
    return kept + 3 * wide + run.tokens * 8


def pending_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes that torch's split backward of a stage adds to a micro-batch's until the weights' turn comes.

    They are the gradients of the results of all matrices and norms.
    """
    first, last = run.layers[stage]
    config = run.config
    norms, serial = (2, not config.parallel_residual) if config.family == "gpt_neox" else (1, False)
    cut = (3 * config.hidden_size + config.intermediate_size) // run.tensor_size
    a_layer = cut + (norms + 1 + serial) * config.hidden_size
    return (last - first) * run.tokens * a_layer * run.width


def receive_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes of a stage's receive buffers: torch makes one for each micro-batch and way, and keeps them."""
    if run.pipeline_size == 1:
        return 0
    ways = (stage > 0) + (stage < len(run.layers) - 1)
    return ways * run.micro_batches * run.hidden_bytes


def logits_bytes(run: PlannedRun) -> int:
    """Return the bytes of the loss's two buffers, and of the gradient of the projection that each chunk makes."""
    rows = run.config.vocab_size // run.tensor_size
    probabilities = 4 if run.precision == "float16" else run.width
    gradient = rows * run.config.hidden_size * (run.width if run.precision == "bfloat16" else 4)
    return min(run.tokens, CHUNK_TOKENS) * rows * (run.width + probabilities) + gradient


def _working_bytes(run: PlannedRun, count: ParameterCount) -> int:
    """Estimate the memory of one layer's backward: its states computed again, their gradients, and a matrix's."""
    part = Part(0, run.tensor_size)
    largest = count_parameters(run.config, layer_name(0), part).largest
    inner = max(run.config.intermediate_size, 3 * run.config.hidden_size) // run.tensor_size
    gradients = run.tokens * (2 * inner + 2 * run.config.hidden_size) * run.width
    matrix = largest * (4 if run.precision == "float32" else 2 + 4)
    return (layer_bytes(run) if run.recompute else 0) + gradients + matrix


def _widens_norms(run: PlannedRun) -> bool:
    return run.on_gpu and run.precision != "float32"


def peak(run: PlannedRun, pipeline_rank: int, kept: Mapping[int, int], pending: Mapping[int, int]) -> int:
    """Return the most bytes of activations that a rank has at a time.

    Each stage has `kept` bytes of a micro-batch from its forward to its backward. In a split backward it has them until
    the gradients of weights are done, and from those of its input on also `pending` bytes.
    """
    if run.pipeline_size == 1:
        return kept[0]
    if run.schedule == "gpipe":
        return kept[pipeline_rank] * run.micro_batches
    if run.schedule == "1f1b":
        return kept[pipeline_rank] * min(run.micro_batches, run.pipeline_size - pipeline_rank)
    splits = SCHEDULES[run.schedule].splits_backward
    actions = list_actions(run, pipeline_rank)
    if actions is None:
        # No schedule can exceed it.
        return sum(kept[stage] + splits * pending[stage] for stage in kept) * run.micro_batches
    now = most = 0
    for action, stage, _ in actions:
        change = {"F": kept[stage], "B": -kept[stage], "I": pending[stage], "W": -kept[stage] - pending[stage]}
        now += change[action]
        most = max(most, now)
    return most


def list_actions(run: PlannedRun, pipeline_rank: int) -> Sequence[tuple[str, int, int]] | None:
    """Return the passes of a rank by torch's schedule, as `pytorch.list_pipeline_actions` has them.

    Of many micro-batches only as many as it takes to reach the steady state: all further ones repeat it.
    """
    number, ranks = run.micro_batches, run.pipeline_size
    if number % ranks == 0:
        number = min(number, 4 * ranks)
    kind = SCHEDULES[run.schedule]
    actions = pytorch.list_pipeline_actions(kind.torch_class, ranks, number, run.stages_a_rank)
    return None if actions is None else actions[pipeline_rank]


def rank_traffic(run: PlannedRun, pipeline_rank: int, tensor_rank: int = 0) -> dict[str, Traffic]:
    """Return what a rank sends in a step, by the kind of the group: `pipeline` what it sends to its neighbours,
    `received` what comes from them, `tensor`, `data` and `ends` tensors that are summed, `control` numbers of the step.
    """
    parts, count = run.tensor_size, count_rank(run, pipeline_rank, tensor_rank)
    traffic = dict.fromkeys(("pipeline", "received", "tensor", "data", "ends", "control"), Traffic())
    passes = run.micro_batches * run.accumulate
    for stage in run.stages_of(pipeline_rank):
        ways = [other for other in (stage - 1, stage + 1) if 0 <= other < len(run.layers)]
        away = sum(other not in run.stages_of(pipeline_rank) for other in ways)
        for name in ("pipeline", "received"):
            traffic[name] += Traffic(away * passes, away * passes * run.hidden_bytes)
        if parts > 1:
            traffic["tensor"] += _sums_over_parts(run, stage, passes)
    if parts > 1:
        traffic["tensor"] += Traffic(math.ceil(count.uncut / BUCKET), 4 * count.uncut)
    if run.replicas > 1:
        traffic["data"] = _sums_over_replicas(run, count)
    ends = {0, len(run.layers) - 1} & {*run.stages_of(pipeline_rank)}
    if run.config.tie_embeddings and len(ends) == 1:
        traffic["ends"] = Traffic(1, 4 * run.config.vocab_size // parts * run.config.hidden_size)
    traffic["control"] = _control(run, count)
    return traffic


def _sums_over_parts(run: PlannedRun, stage: int, passes: int) -> Traffic:
    """Return the all-reduces of a stage's seams and of its loss, as `Stage.connect_parts` and `VocabularyLoss` say."""
    first, last = run.layers[stage]
    serial = run.config.family == "gpt_neox" and not run.config.parallel_residual
    # A serial layer that is computed again sums its attention's results again; its last sum nothing depends on.
    a_layer = 2 + (2 + run.recompute if serial else 0)
    messages = a_layer * (last - first)
    size = messages * run.hidden_bytes
    if stage == 0:
        messages += 1
        size += run.tokens * run.config.hidden_size * 4  # the embedding is float32
    if stage == len(run.layers) - 1:
        messages += 1 + 2 * math.ceil(run.tokens / CHUNK_TOKENS)
        size += run.hidden_bytes + run.tokens * 4 * (1 + 4)
    return Traffic(passes * messages, passes * size)


def _sums_over_replicas(run: PlannedRun, count: ParameterCount) -> Traffic:
    """Return the reductions of gradients, and where replicas share masters the broadcasts of new weights.

    Messages are at least as many: buckets are cut between parameters.
    """
    if run.dp_mode == "allreduce":
        return Traffic(math.ceil(count.elements / BUCKET), 4 * count.elements)
    copies = count.matrices * run.width + (count.elements - count.matrices) * 4
    messages = run.replicas * math.ceil(count.elements / run.replicas / BUCKET)
    return Traffic(2 * messages, 4 * count.elements + copies)


def _control(run: PlannedRun, count: ParameterCount) -> Traffic:
    """Return the sums of a step's counts, losses and norms, all of 8 bytes, with one source of data."""
    norms, source = run.config.num_layers + 2, 1
    sizes = []
    if run.replicas > 1:
        sizes += [2 + source, 2 + source]
        if run.dp_mode == "sharded":
            sizes.append(math.ceil(count.elements / SMALLEST_8_BIT))
    if run.tensor_size > 1:
        sizes.append(norms + 2)
    if run.pipeline_size > 1:
        sizes.append(norms + 1 + 2 + source)
    return Traffic(len(sizes), 8 * sum(sizes))


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
    again = sum(2 * run.tokens * width * result for width, result in _list_products(run) if result > width)
    return 3 + again / layer_operations(run)


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
