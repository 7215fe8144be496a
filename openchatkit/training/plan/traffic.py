"""Messages of a step of a planned run, by the group that they go through."""

import math
from dataclasses import dataclass

from openchatkit.training.loss import CHUNK_TOKENS
from openchatkit.training.plan.memory import BUCKET
from openchatkit.training.plan.parameters import SMALLEST_8_BIT, ParameterCount, count_rank
from openchatkit.training.plan.planned_run import PlannedRun


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
