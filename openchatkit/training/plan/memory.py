"""Bytes that a rank of a planned run holds, by kind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from openchatkit.loading.hardware import DTYPES
from openchatkit.models.cuts import WHOLE, Part
from openchatkit.models.shards import EMBED, HEAD, layer_name
from openchatkit.training.buckets import BUCKET
from openchatkit.training.loss import CHUNK_TOKENS
from openchatkit.training.plan.parameters import ParameterCount, count_parameters, count_rank
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.traced_layer import count_kept_bytes
from openchatkit.training.plan.work import inner_widths, list_products, list_steady_passes
from openchatkit.training.runs import UNIT
from openchatkit.training.schedules import SCHEDULES


@dataclass(frozen=True)
class StateBytes:
    """Bytes of training state for each element of a parameter, but for the optimizer's moments."""

    weight: float
    gradient: float
    master: float


# The one source of the bytes of a parameter, the design of `training.weights`: layers compute with half-precision
# copies of their matrices, and everything else is float32. Where a parameter is float32, it is its own master.
STATE = {
    ("matrix", "half"): StateBytes(weight=2, gradient=4, master=4),
    ("matrix", "float32"): StateBytes(weight=4, gradient=4, master=0),
    ("other", "half"): StateBytes(weight=4, gradient=4, master=0),
    ("other", "float32"): StateBytes(weight=4, gradient=4, master=0),
}
# The optimizer's state, by its form (see `optimization.name_moments`). Moments of 8 bits have a float32 scale for each
# block of 256. SM3 has a float32 number for each row and column besides.
MOMENTS = {
    "float32": 8.0,
    "bf16": 4.0,
    "8bit": 2 + 2 * 4 / 256,
    "lion": 4.0,
    "madgrad": 12.0,
    "madgrad without momentum": 8.0,
    "sm3": 4.0,
    "sm3 without momentum": 0.0,
}


@dataclass(frozen=True)
class RankBytes:
    """Bytes that a rank holds on its device, by kind, at the fullest moment of a step.

    `moments` are the optimizer's; `working` memory is that of one layer's backward, of what replicas gather of each
    other for it, and of gradients on their way to them.
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

    @property
    def least(self) -> float:
        """The sum of what is there for certain: all but the estimate of working memory."""
        return self.total - self.working


def rank_bytes(run: PlannedRun, pipeline_rank: int, tensor_rank: int = 0) -> RankBytes:
    """Return the bytes of a rank on its device."""
    count = count_rank(run, pipeline_rank, tensor_rank)
    weights, gradients, masters, moments = _state_bytes(run, count)
    if run.offload and run.on_gpu:
        masters = moments = 0  # see `main_memory_bytes`
    stages = run.stages_of(pipeline_rank)
    kept = {stage: kept_bytes(run, stage) for stage in stages}
    activations = peak(run, pipeline_rank, kept, {stage: pending_bytes(run, stage) for stage in stages})
    has_head = len(run.layers) - 1 in stages
    return RankBytes(
        weights=weights,
        gradients=gradients + (_projection_gradient_bytes(run) if has_head else 0),
        masters=masters,
        moments=moments,
        activations=activations,
        receive_buffers=sum(receive_bytes(run, stage) for stage in stages),
        logits=logits_bytes(run) if has_head else 0,
        working=float(_working_bytes(run, count, activations)),
    )


def fullest_rank(run: PlannedRun) -> int:
    """Return the pipeline rank that holds most; the first rank of its tensor group does."""
    return max(range(run.pipeline_size), key=lambda rank: rank_bytes(run, rank).total)


def main_memory_bytes(run: PlannedRun, pipeline_rank: int, tensor_rank: int = 0) -> float:
    """Return the bytes that a rank with a GPU holds in main memory: state and its gradients, and inputs of layers."""
    if not run.on_gpu:
        return 0.0
    size = 0.0
    if run.offload:
        count = count_rank(run, pipeline_rank, tensor_rank)
        _, _, masters, moments = _state_bytes(run, count)
        size += masters + moments + 4 * count.elements / _share(run, "sharded", "sharded-gradients")
    if run.activation_offload:
        inputs = {
            stage: (run.layers[stage][1] - run.layers[stage][0]) * run.hidden_bytes
            for stage in run.stages_of(pipeline_rank)
        }
        size += peak(run, pipeline_rank, inputs, dict.fromkeys(inputs, 0))
    return size


def _state_bytes(run: PlannedRun, count: ParameterCount) -> tuple[float, float, float, float]:
    """Return the bytes of weights, gradients, masters and moments, all of them on one device."""
    if run.dp_mode == "sharded-parameters":
        # Float32 rows of matrices, which are their own masters; vectors are whole on every replica.
        held = (count.elements - count.vectors) / run.replicas + count.vectors
        return 4 * held, 4 * held, 0.0, MOMENTS[run.moments] * held
    computes = "float32" if run.precision == "float32" else "half"
    sizes = {"matrix": count.matrices, "other": count.elements - count.matrices}
    weights, gradients, masters = (
        sum(size * float(getattr(STATE[kind, computes], field)) for kind, size in sizes.items())
        for field in ("weight", "gradient", "master")
    )
    if run.offload:
        masters = 4.0 * count.elements
    moments = _moment_bytes(run.moments, count)
    share = _share(run, "sharded", "sharded-gradients")
    return weights, gradients / _share(run, "sharded-gradients"), masters / share, moments / share


def _moment_bytes(moments: str, count: ParameterCount) -> float:
    """Return the bytes of the optimizer's state of some parameters, of which each replica has all."""
    of_small = MOMENTS["float32" if moments == "8bit" else moments]
    lines = 4 * count.lines if moments.startswith("sm3") else 0
    return (count.elements - count.small) * MOMENTS[moments] + count.small * of_small + lines


def _share(run: PlannedRun, *modes: str) -> int:
    """Return among how many replicas something is shared that they share in some modes."""
    return run.replicas if run.dp_mode in modes else 1


def _projection_gradient_bytes(run: PlannedRun) -> int:
    """Return the bytes of the projection's own gradient, which the loss writes, where gradients are shared."""
    if run.replicas == 1 or run.dp_mode != "sharded-gradients":
        return 0
    return 4 * _count(run, HEAD).matrices


def layer_bytes(run: PlannedRun) -> int:
    """Return the bytes that one layer keeps of a micro-batch for its backward, but for its input.

    Normed inputs, queries, keys and values (before and after rotation), attention's results and their sums of
    exponentials, and the MLP's two inner states; masks of documents are not counted. A GPU's attention keeps one of the
    two results that a CPU's keeps.
    """
    config, parts = run.config, run.tensor_size
    if config.family == "neox" and (traced := _traced_layer_bytes(run)) is not None:
        return traced
    hidden, attention, inner = config.hidden_size, config.hidden_size // parts, config.intermediate_size // parts
    norms, serial = _count_norms(run), not config.parallel_residual
    # GPT-NeoX keeps queries, keys and values in one matrix, whose values alone are used in the end.
    states = norms * hidden + (5 if config.family == "gptj" else 7) * attention + 2 * inner
    # A serial layer's second norm is given a state of its own; a GPU's norms all are, and in float32.
    wide = norms * hidden * 4 if _widens_norms(run) else serial * hidden * run.width
    statistics = 4 * (2 * norms + config.num_heads // parts)
    return run.tokens * (states * run.width + wide + statistics)


def _count_norms(run: PlannedRun) -> int:
    return 1 if run.config.family == "gptj" or run.config.options.gpt_j_tied else 2


def _traced_layer_bytes(run: PlannedRun) -> int | None:
    """Return `layer_bytes` of a layer with options, as a layer on a CPU says; None where it cannot be asked."""
    config = run.config
    kept = count_kept_bytes(
        config,
        parts=run.tensor_size,
        rows=run.micro_batch_size,
        length=run.seq_length,
        dtype=DTYPES[run.precision],
    )
    if kept is None:
        return None
    if not _widens_norms(run):
        return kept - run.whole_bytes
    if not config.options.norm.endswith("layernorm"):
        return kept  # which has float32 copies of the norms' inputs, and not these
    inputs = 1 if config.parallel_residual else 2
    return kept - inputs * run.whole_bytes + _count_norms(run) * run.tokens * config.hidden_size * 4


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
    inner = _saved_result_bytes(run) if run.recompute else layer_bytes(run)
    kept = layers * inner + _confinement_bytes(run, stage)
    if run.activation_offload and run.on_gpu:
        pass  # see `main_memory_bytes`
    elif run.recompute or not run.sequence_parallel:
        # A layer that is not computed again needs its input for its norms, which on a GPU have a copy of their own.
        inputs = 0 if _widens_norms(run) and not run.recompute else max(layers - received, 0)
        kept += inputs * run.hidden_bytes
    elif not _widens_norms(run):
        kept += layers * run.whole_bytes  # their norms need all tokens, which were gathered for each layer
    if stage < len(run.layers) - 1:
        return kept + run.hidden_bytes  # the stage's result, while it is sent, and until its gradient comes
    # The head's norm keeps its input and two numbers a token, the stage its result, and the loss the result's gradient.
    wide = run.tokens * run.config.hidden_size * (4 if _widens_norms(run) else run.width)
    norm = run.config.options.norm
    if not norm.endswith("layernorm"):
        # An RMSNorm also keeps what it multiplies by its scale; both norms, their input in float32 if it was not.
        kept += run.tokens * run.config.hidden_size * 4 * (norm.startswith("rmsnorm") + (run.precision != "float32"))
    return kept + 3 * wide + run.tokens * 8


def _confinement_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes of a micro-batch's masks, and of rotary tables by the tokens' places in documents.

    Layers of one kind share a mask; that of ALiBi's biases is one a head, and the only one that a GPU keeps. Sparse
    layers count as if all heads had one layout.
    """
    options, (first, last) = run.config.options, run.layers[stage]
    weighs = options.pos_emb == "alibi"
    if run.on_gpu and not weighs:
        return 0
    kinds = {*options.attention_config[first:last]} or {"global"}
    if not (weighs or run.documents or options.sliding_window_width is not None):
        kinds -= {"global"}  # a row's tokens, which see all before them
    heads = run.config.num_heads // run.tensor_size if weighs else 1
    rows = run.micro_batch_size if run.documents else 1
    tables = run.tokens * run.config.rotary_dim * 4 if run.documents else 0
    return len(kinds) * rows * heads * run.seq_length**2 * run.width + tables


def pending_bytes(run: PlannedRun, stage: int) -> int:
    """Return the bytes that torch's split backward of a stage adds to a micro-batch's until the weights' turn comes.

    They are the gradients of the results of all matrices and norms.
    """
    first, last = run.layers[stage]
    config = run.config
    # The branches' results have one gradient in a parallel layer.
    whole = (_count_norms(run) + (1 if config.parallel_residual else 2)) * config.hidden_size
    a_layer = sum(inner_widths(run)) + whole
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


def _working_bytes(run: PlannedRun, count: ParameterCount, activations: int) -> float:
    """Estimate the memory of one layer's backward: its states computed again, their gradients, and a matrix's.

    Besides, what replicas hold of each other, and of gradients or new weights that are on their way.
    """
    layer = _count(run, layer_name(0))
    inner = max(inner_widths(run))
    gradients = run.tokens * (2 * inner + 2 * run.config.hidden_size) * run.width
    matrix = layer.largest * (4 if run.precision == "float32" else 2 + 4)
    backward = (layer_bytes(run) if run.recompute else 0) + gradients + matrix
    if run.replicas == 1 or run.dp_mode == "allreduce":
        return backward
    if run.dp_mode == "sharded":
        # Weights are sent in buckets, when all micro-batches have passed.
        return max(backward, 4 * min(count.elements / run.replicas, BUCKET) - activations)
    if run.dp_mode == "sharded-gradients":
        others = count.elements - _count(run, HEAD).matrices
        return backward + 4 * (min(others, BUCKET + count.largest) + min(count.elements / run.replicas, BUCKET))
    return max(backward - matrix + _gathered_bytes(run, layer.matrices), _gathered_ends_bytes(run))


def _gathered_bytes(run: PlannedRun, matrices: int) -> int:
    """Return the bytes of two layers that were gathered, of one's gradients, and of those on their way in float32."""
    return matrices * (2 * run.width + run.width + 2 * 4)


def _gathered_ends_bytes(run: PlannedRun) -> int:
    """Return the bytes of a gathered embedding and its gradient, on its way as well, or of the head and its."""
    embedding = _count(run, EMBED).elements
    return max(embedding * 3 * 4, _count(run, HEAD).matrices * (run.width + 2 * 4))


def _count(run: PlannedRun, shard: str) -> ParameterCount:
    return count_parameters(run.config, shard, Part(0, run.tensor_size))


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
    actions = list_steady_passes(run, pipeline_rank)
    if actions is None:
        # No schedule can exceed it.
        return sum(kept[stage] + splits * pending[stage] for stage in kept) * run.micro_batches
    now = most = 0
    for action, stage, _ in actions:
        change = {"F": kept[stage], "B": -kept[stage], "I": pending[stage], "W": -kept[stage] - pending[stage]}
        now += change[action]
        most = max(most, now)
    return most


def checkpoint_bytes(run: PlannedRun) -> float:
    """Return the bytes of a checkpoint: float32 weights of the whole model, each once, and the optimizer's state."""
    config = run.config
    count = count_parameters(config, layer_name(0), WHOLE).times(config.num_layers)
    count += count_parameters(config, EMBED, WHOLE) + count_parameters(config, HEAD, WHOLE)
    moments = _moment_bytes(run.moments, count)
    if not config.tie_embeddings:
        return 4 * count.elements + moments
    rows, width = config.vocab_size, config.hidden_size
    projection = ParameterCount(
        elements=rows * width, small=rows * width if rows * width < UNIT else 0, lines=rows + width
    )
    return 4 * (count.elements - projection.elements) + moments - _moment_bytes(run.moments, projection)
