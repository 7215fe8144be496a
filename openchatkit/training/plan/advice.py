"""Advice on a planned run: ranks that it wastes, and layouts that would not, or that would fit."""

import math

from openchatkit.training.config import Settings
from openchatkit.training.plan import search, work
from openchatkit.training.plan.memory import fullest_rank, rank_bytes
from openchatkit.training.plan.planned_run import PlannedRun

_WASTEFUL = 1 / 3  # share of a step that ranks wait in
_GIB = 1 << 30


def list_warnings(settings: Settings, run: PlannedRun, *, room: float | None = None) -> list[str]:
    """Return a line for each way in which a layout wastes ranks, with a better one where there is one.

    `room` is the memory of a rank in bytes, where that is known.
    """
    lines = []
    waiting = work.idle_share(run)
    if waiting > _WASTEFUL:
        better = search.find_less_idle(settings, run, room=room)
        if better is None:
            advice = "give more rows (--batch-size), smaller micro-batches or fewer stages"
        else:
            advice = f"{work.idle_share(better.run):.0%} with {' '.join(better.list_changes(settings))}"
        lines.append(
            f"ranks wait in {waiting:.0%} of a step: {len(run.layers)} stages take turns with {run.micro_batches} "
            f"micro-batches; {advice}"
        )
    if run.replicas == 1 and run.dp_mode != "allreduce":
        lines.append(f"--dp-mode {run.dp_mode} has no effect: there is one replica")
    if run.sequence_parallel and run.tensor_size == 1:
        lines.append("--sequence-parallel has no effect: there is no tensor group")
    return lines


def name_fitting(settings: Settings, run: PlannedRun, room: float, *, host_room: float = math.inf) -> str:
    """Return a clause on what would fit into `room` bytes a rank, on the same ranks with the same rows a step."""
    found = search.find_fitting(
        settings,
        run.config,
        room,
        on_gpu=run.on_gpu,
        global_batch=run.step_tokens // run.seq_length,
        host_room=host_room,
    )
    if found is None:
        return f"no layout of {run.world_size} ranks with these rows fits: use more ranks, or a smaller model"
    size = rank_bytes(found.run, fullest_rank(found.run)).total / _GIB
    return f"{size:.1f} GiB would do with {' '.join(found.list_changes(settings))}"
