"""The order of a step's work and its operations, of a planned run."""

from collections.abc import Sequence

from openchatkit.libraries import pytorch
from openchatkit.models.cuts import Part
from openchatkit.models.shards import layer_name
from openchatkit.training.plan.parameters import count_parameters
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.schedules import SCHEDULES


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
    hidden, parts = run.config.hidden_size, run.tensor_size
    attention, inner = hidden // parts, run.config.intermediate_size // parts
    first = [(hidden, 3 * attention)] if run.config.family == "gpt_neox" else 3 * [(hidden, attention)]
    return [*first, (attention, hidden), (hidden, inner), (inner, hidden)]


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
