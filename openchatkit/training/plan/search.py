"""Other layouts of a run's cards and rows: the fastest that fit, and the nearest that waits less or holds less."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openchatkit.errors import UserError
from openchatkit.models.config import ModelConfig
from openchatkit.settings import flag
from openchatkit.training.config import RECOMPUTING, Settings
from openchatkit.training.plan import work
from openchatkit.training.plan.memory import fullest_rank, main_memory_bytes, rank_bytes
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.planner import plan_run
from openchatkit.training.plan.times import Machines, estimate

MICRO_BATCH_SIZES = (1, 2, 4, 8)
# Settings that a candidate may have of its own, in the order in which a message names them.
_CHOSEN = (
    "pipeline_group_size",
    "tensor_group_size",
    "data_group_size",
    "pp_mode",
    "stages_per_rank",
    "num_layers",
    "dp_mode",
    "batch_size",
    "micro_batch_size",
    "gradient_accumulate_step",
    "activation_checkpointing",
    "optimizer_state",
    "use_offload",
)
# Where nothing is known of the machines: 100 TFLOP/s, 10 GB/s between hosts of eight cards and 50 within one.
_TYPICAL = Machines(operations=1e14, link=1e10, local=5e10, cards_a_host=8)

# A layout that excludes no other setting, to start from.
ONE_RANK: dict[str, Any] = {
    "rank": 0,
    "world_size": 1,
    "pipeline_group_size": 1,
    "data_group_size": 1,
    "tensor_group_size": 1,
    "pp_mode": "gpipe",
    "stages_per_rank": None,
    "check_replicas": 0,
}


@dataclass(frozen=True)
class Candidate:
    """A run's settings in another layout, and the plan of it."""

    settings: Settings
    run: PlannedRun

    def list_changes(self, settings: Settings) -> list[str]:
        """Return the flags that make of other settings these."""
        names = [name for name in _CHOSEN if getattr(self.settings, name) != getattr(settings, name)]
        if settings.check_replicas and (self.run.replicas == 1 or self.run.dp_mode == "sharded-parameters"):
            names.append("check_replicas")  # elsewhere it may stay: no count depends on it
        return [f"{flag(name)} {_format_value(getattr(self.settings, name))}" for name in names]


def list_candidates(
    settings: Settings,
    config: ModelConfig,
    *,
    cards: int,
    global_batch: int,
    tensor_sizes: Iterable[int],
    micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES,
    recomputing: Sequence[str] = RECOMPUTING,
    on_gpu: bool = True,
) -> Iterator[Candidate]:
    """Yield all layouts of so many cards that the model can be trained in, with so many rows a step."""
    for parts, pipeline_size in itertools.product(tensor_sizes, list_divisors(cards)):
        replicas, rest = divmod(cards, parts * pipeline_size)
        if rest or pipeline_size > config.num_layers or global_batch % replicas:
            continue
        schedules: list[tuple[str, int | None]] = [("1f1b", None), *(("interleaved", several) for several in (2, 3, 4))]
        if pipeline_size == 1:
            schedules = [("gpipe", None)]
        rows = global_batch // replicas
        for (schedule, stages), size, again in itertools.product(schedules, micro_batch_sizes, recomputing):
            if rows % size or (stages or 1) * pipeline_size > config.num_layers:
                continue
            for accumulate in list_divisors(rows // size):
                try:
                    chosen = replace(
                        settings,
                        world_size=cards,
                        rank=0,
                        pipeline_group_size=pipeline_size,
                        data_group_size=replicas,
                        tensor_group_size=parts,
                        sequence_parallel=settings.sequence_parallel and parts > 1,
                        num_layers=0,
                        pp_mode=schedule,
                        stages_per_rank=stages,
                        check_replicas=0,
                        micro_batch_size=size,
                        batch_size=rows // accumulate,
                        gradient_accumulate_step=accumulate,
                        activation_checkpointing=again,
                    )
                    yield Candidate(chosen, plan_run(chosen, config, on_gpu=on_gpu))
                except UserError:  # a model that has no such parts, or a schedule that has no such number of batches
                    continue


def find_fastest(
    candidates: Iterable[Candidate], machines: Machines, room: float, *, number: int, host_room: float = math.inf
) -> list[Candidate]:
    """Return the layouts whose best settings are fastest, of those of which a card's share fits into `room` bytes.

    `host_room` is the main memory that a card has for what is offloaded.
    """
    found: dict[tuple[int, int, int], Candidate] = {}
    ranking = sorted(
        ((estimate(each.run, machines).total, place, each) for place, each in enumerate(candidates)),
        key=lambda each: each[:2],
    )
    for _, _, each in ranking:
        layout = (each.run.pipeline_size, each.run.replicas, each.run.tensor_size)
        if layout not in found and fits(each.run, room, host_room):
            found[layout] = each
            if len(found) == number:
                break
    return list(found.values())


def fits(run: PlannedRun, room: float, host_room: float = math.inf) -> bool:
    """Whether all ranks of a run fit into so many bytes each, and into so many of main memory."""
    rank = fullest_rank(run)
    return rank_bytes(run, rank).total <= room and main_memory_bytes(run, rank) <= host_room


def find_less_idle(settings: Settings, run: PlannedRun, *, room: float | None = None) -> Candidate | None:
    """Return the layout of the same ranks, tensor groups and rows that waits least; None if none waits clearly less.

    It fits into `room` bytes a rank, or where that is not known holds no more than the run. Of equals, the one that
    changes least.
    """
    limit = rank_bytes(run, fullest_rank(run)).total if room is None else room
    candidates = list_candidates(
        settings,
        run.config,
        cards=run.world_size,
        global_batch=run.step_tokens // run.seq_length,
        tensor_sizes=(run.tensor_size,),
        micro_batch_sizes=[size for size in MICRO_BATCH_SIZES if size <= run.micro_batch_size],
        recomputing=(settings.activation_checkpointing,),
        on_gpu=run.on_gpu,
    )
    least, best = work.idle_share(run) - 0.02, None
    ranking = sorted(
        (
            (work.bubble(each.run), len(each.list_changes(settings)), place, each)
            for place, each in enumerate(candidates)
        ),
        key=lambda each: each[:3],
    )
    for _, _, _, each in ranking[:20]:
        if fits(each.run, limit) and work.idle_share(each.run) < least:
            least, best = work.idle_share(each.run), each
    return best


def find_fitting(
    settings: Settings,
    config: ModelConfig,
    room: float,
    *,
    on_gpu: bool,
    global_batch: int,
    host_room: float = math.inf,
) -> Candidate | None:
    """Return the fastest layout of a run's ranks and rows that fits into `room` bytes a rank; None if none does.

    State stays as exact as it is, if that fits: then come masters in main memory, and last smaller moments.
    """
    changes: list[dict[str, Any]] = [{}]
    if on_gpu and not settings.use_offload:
        changes.append({"use_offload": True})
    if settings.moments == "float32":
        changes.append({"optimizer_state": "bf16"})
    for change in changes:
        for mode in dict.fromkeys((settings.dp_mode, "sharded", "sharded-parameters")):
            try:
                changed = replace(settings, **ONE_RANK, **change, dp_mode=mode)
            except UserError:
                continue
            candidates = list_candidates(
                changed,
                config,
                cards=settings.world_size,
                global_batch=global_batch,
                tensor_sizes=dict.fromkeys((settings.tensor_group_size, 1, 2, 4, 8)),
                micro_batch_sizes=[size for size in MICRO_BATCH_SIZES if size <= settings.micro_batch_size],
                on_gpu=on_gpu,
            )
            found = find_fastest(candidates, _TYPICAL, room, number=1, host_room=host_room)
            if found:
                return found[0]
    return None


def list_divisors(number: int) -> list[int]:
    """Return what divides a number."""
    return [each for each in range(1, number + 1) if number % each == 0]


def _format_value(value: object) -> str:
    if value is None:  # stages a rank, where the flag is not given
        return "1"
    return str(value).lower() if isinstance(value, bool) else str(value)
