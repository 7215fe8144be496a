"""Bytes that a rank of a planned run holds, by kind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from openchatkit.models.cuts import Part
from openchatkit.models.shards import layer_name
from openchatkit.training.loss import CHUNK_TOKENS
from openchatkit.training.plan.parameters import ParameterCount, count_parameters, count_rank
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.work import list_actions, list_products
from openchatkit.training.schedules import SCHEDULES

BUCKET = 1 << 25  # elements that replicas reduce at a time


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


def _choose_kept_products(run: PlannedRun) -> list[tuple[int, int]]:
    """Return the products that are not computed again, as `models.recompute` chooses them."""
    return [(width, result) for width, result in list_products(run) if run.selective and result <= width]


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
