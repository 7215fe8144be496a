"""Messages of a step of a planned run, by the group that they go through."""

import math
from dataclasses import dataclass

from openchatkit.models.cuts import Part
from openchatkit.models.shards import HEAD
from openchatkit.training.buckets import BUCKET
from openchatkit.training.loss import CHUNK_TOKENS
from openchatkit.training.plan.parameters import ParameterCount, count_parameters, count_rank
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.runs import UNIT


@dataclass(frozen=True)
class Traffic:
    """Messages of a step that a rank sends, or collectives that it takes part in, and the bytes of their tensors."""

    messages: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)


def rank_traffic(run: PlannedRun, pipeline_rank: int, tensor_rank: int = 0) -> dict[str, Traffic]:
    """Return what a rank sends in a step, by the kind of the group: `pipeline` what it sends to its neighbours,
    `received` what comes from them, `tensor`, `data` and `ends` tensors that are summed, `control` numbers of the step.
    `gathered` are tensors of all tokens, which a tensor group gathers, or sums and scatters. `data` also has new
    weights that are handed on, and matrices that replicas gather of each other.
    """
    parts, count = run.tensor_size, count_rank(run, pipeline_rank, tensor_rank)
    kinds = ("pipeline", "received", "tensor", "gathered", "data", "ends", "control")
    traffic = dict.fromkeys(kinds, Traffic())
    passes = run.micro_batches * run.accumulate
    for stage in run.stages_of(pipeline_rank):
        ways = [other for other in (stage - 1, stage + 1) if 0 <= other < len(run.layers)]
        away = sum(other not in run.stages_of(pipeline_rank) for other in ways)
        for name in ("pipeline", "received"):
            traffic[name] += Traffic(away * passes, away * passes * run.hidden_bytes)
        if parts > 1:
            name = "gathered" if run.sequence_parallel else "tensor"
            traffic[name] += _seams(run, stage, passes)
            traffic["tensor"] += _sums_of_loss(run, stage, passes)
    if parts > 1:
        traffic["tensor"] += Traffic(math.ceil(count.uncut / BUCKET), 4 * count.uncut)
    if run.replicas > 1:
        traffic["data"] = _between_replicas(run, count, passes)
    ends = {0, len(run.layers) - 1} & {*run.stages_of(pipeline_rank)}
    if run.config.tie_embeddings and len(ends) == 1:
        traffic["ends"] = Traffic(1, 4 * run.config.vocab_size // parts * run.config.hidden_size)
    traffic["control"] = _control(run, count)
    return traffic


def _seams(run: PlannedRun, stage: int, passes: int) -> Traffic:
    """Return what passes through a stage's seams, as `Stage.connect_parts` says: sums, or gathers and scatters.

    A serial layer that is computed again sums its attention's results again; its last sum nothing depends on. Each
    gather is computed again as well.
    """
    first, last = run.layers[stage]
    serial = run.config.family == "gpt_neox" and not run.config.parallel_residual
    pairs = 2 if serial else 1
    if run.sequence_parallel:
        a_layer = 4 * pairs + run.recompute * (2 * pairs - 1)
    else:
        a_layer = 2 * pairs + run.recompute * (pairs - 1)
    messages = a_layer * (last - first)
    size = messages * run.whole_bytes
    ways = 2 if run.sequence_parallel else 1  # of what is summed one way alone otherwise
    if stage == 0:
        messages += ways
        size += ways * run.tokens * run.config.hidden_size * 4  # the embedding is float32
    if stage == len(run.layers) - 1:
        messages += ways
        size += ways * run.whole_bytes
    return Traffic(passes * messages, passes * size)


def _sums_of_loss(run: PlannedRun, stage: int, passes: int) -> Traffic:
    """Return the all-reduces of a stage's loss, as `VocabularyLoss` says."""
    if stage < len(run.layers) - 1:
        return Traffic()
    return Traffic(passes * 2 * math.ceil(run.tokens / CHUNK_TOKENS), passes * run.tokens * 4 * (1 + 4))


def _between_replicas(run: PlannedRun, count: ParameterCount, passes: int) -> Traffic:
    """Return the reductions of gradients, and where replicas share state what they hand on of new weights.

    Messages are at least as many, since buckets are cut between parameters; where gradients are reduced in every pass,
    about as many.
    """
    if run.dp_mode == "allreduce":
        return Traffic(math.ceil(count.elements / BUCKET), 4 * count.elements)
    if run.dp_mode == "sharded-parameters":
        return _gathers_of_matrices(run, count, passes)
    copies = count.matrices * run.width + (count.elements - count.matrices) * 4
    messages = run.replicas * math.ceil(count.elements / run.replicas / BUCKET)
    once = count_parameters(run.config, HEAD, Part(0, run.tensor_size)).matrices
    if run.dp_mode == "sharded" or count.elements - once < BUCKET:
        # Gradients that all together are worth no message wait for those of later passes.
        return Traffic(2 * messages, 4 * count.elements + copies)
    reduced = passes * (count.elements - once) + once
    return Traffic((passes + 1) * messages, 4 * reduced + copies)


def _gathers_of_matrices(run: PlannedRun, count: ParameterCount, passes: int) -> Traffic:
    """Return what `fully_shard` gathers and scatters: each shard but the head twice, and gradients in each pass."""
    embedding = count.elements - count.matrices - count.vectors
    head = count_parameters(run.config, HEAD, Part(0, run.tensor_size)).matrices
    gathered = (2 * count.matrices - head) * run.width + 2 * embedding * 4
    scattered = 4 * (count.elements - count.vectors)
    messages = 3 * (run.config.num_layers + 2) - 1
    return Traffic(passes * messages + 1, passes * (gathered + scattered) + 4 * count.vectors)


def _control(run: PlannedRun, count: ParameterCount) -> Traffic:
    """Return the sums of a step's counts, losses and norms, all of 8 bytes, with one source of data."""
    norms, source = run.config.num_layers + 2, 1
    sizes = []
    if run.replicas > 1:
        sizes += [2 + source, 2 + source]
        if run.dp_mode == "sharded-parameters":
            sizes.append(norms)
        elif run.dp_mode != "allreduce":
            sizes.append(math.ceil(count.elements / UNIT))
    if run.tensor_size > 1:
        sizes.append(norms + 2)
    if run.pipeline_size > 1:
        sizes.append(norms + 1 + 2 + source)
    return Traffic(len(sizes), 8 * sum(sizes))
