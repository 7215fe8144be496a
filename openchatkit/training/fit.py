"""Checks of a run before its weights are loaded: memory, disk, links, and ranks that its layout wastes.

What is refused cannot work: the least that a run holds is more than there is. What may be close is warned of.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from loguru import logger

from openchatkit import storage
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.loading import hardware
from openchatkit.training.config import Settings
from openchatkit.training.plan import work
from openchatkit.training.plan.advice import list_warnings, name_fitting
from openchatkit.training.plan.memory import checkpoint_bytes, main_memory_bytes, rank_bytes
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.traffic import rank_traffic

_GIB = 1 << 30
_SPARE = 2 * _GIB  # of a card, for kernels, NCCL and gaps between blocks
_PROBE = 1 << 22  # elements
_PROBES = 3


@dataclass(frozen=True)
class RankNeed:
    """Bytes that a rank holds for certain and by estimate, on its card and in main memory, and what its card has.

    On a CPU everything is in main memory.
    """

    host: str
    card: float | None
    least: float
    likely: float
    main_least: float
    main_likely: float


def check_run(settings: Settings, plan: PlannedRun, layout: Layout, *, total_steps: int) -> None:
    """Refuse a run that cannot fit, and warn of what may not or is wasteful; all ranks call this together.

    `plan` is the run's with what this layout's devices compute in. UserError on all ranks.
    """
    needs = layout.gather(_find_need(plan, layout))
    room = _find_room(needs, layout)
    warnings = layout.together(lambda: _check_memory(settings, plan, layout, needs, room))
    if layout.rank == 0:
        for warning in dict.fromkeys(filter(None, warnings)):
            logger.warning(warning)
        if layout.pipeline_size > 1:
            logger.info("by the order of passes, ranks wait in {:.0%} of a step", work.idle_share(plan))
        for warning in list_warnings(settings, plan, room=room):
            logger.warning(warning)
    layout.together(lambda: None if layout.rank else _check_disk(settings, plan, total_steps))
    _check_links(plan, layout, [need.host for need in needs])


def identify_host() -> str:
    """Return what tells this machine from others, whatever their names are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import socket

        return socket.gethostname()


def _find_need(plan: PlannedRun, layout: Layout) -> RankNeed:
    held = rank_bytes(plan, layout.pipeline_rank, layout.tensor_rank)
    if layout.device.type != "cuda":
        return RankNeed(identify_host(), None, 0.0, 0.0, held.least, held.total)
    card = float(torch.cuda.get_device_properties(layout.device).total_memory)
    main = main_memory_bytes(plan, layout.pipeline_rank, layout.tensor_rank)
    return RankNeed(identify_host(), card, held.least, held.total, main, main)


def _find_room(needs: list[RankNeed], layout: Layout) -> float | None:
    """Return the bytes that a rank can have: of its card, or its share of this host; None where that is unknown."""
    own = needs[layout.rank]
    if own.card is not None:
        return own.card - _SPARE
    ranks_here = sum(need.host == own.host for need in needs)
    return hardware.main_memory() / ranks_here or None


def _check_memory(
    settings: Settings, plan: PlannedRun, layout: Layout, needs: list[RankNeed], room: float | None
) -> str | None:
    """Return a warning where memory may be too small. UserError where it certainly is."""
    own = needs[layout.rank]
    here = [need for need in needs if need.host == own.host]
    least, likely = (sum(getattr(need, name) for need in here) for name in ("main_least", "main_likely"))
    main = hardware.main_memory()
    if own.card is not None and own.least > own.card:
        raise UserError(
            f"{layout.describe()} holds {_format(own.least)} at least, and its GPU has {_format(own.card)}: "
            f"{name_fitting(settings, plan, own.card - _SPARE)}"
        )
    if main and least > main:
        advice = name_fitting(settings, plan, main / len(here))
        if own.card is not None:
            advice = "leave --use-offload out, give --dp-mode sharded, or start fewer ranks on a host"
        raise UserError(
            f"ranks of this host, {len(here)}, hold {_format(least)} of main memory at least, and it has "
            f"{_format(main)}: {advice}"
        )
    if own.card is not None and own.likely + _SPARE > own.card:
        return (
            f"memory will be close: {layout.describe()} may hold {_format(own.likely)} and what kernels need, and its "
            f"GPU has {_format(own.card)}"
        )
    if main and likely > 0.9 * main:
        return (
            f"memory will be close: ranks of this host, {len(here)}, may hold {_format(likely)} of main memory, and it "
            f"has {_format(main)}"
        )
    return None


def _check_disk(settings: Settings, plan: PlannedRun, total_steps: int) -> None:
    """Warn where there is no room for all checkpoints that are to be kept. UserError where there is none for one."""
    size, folder = checkpoint_bytes(plan), settings.checkpoint_path
    # The run removes what a killed save has left before it writes.
    free = storage.free_bytes(folder) + checkpoint.count_leftover_bytes(folder)
    there = checkpoint.list_steps(folder)
    if there and max(there) >= total_steps:
        return  # Nothing is left to do.
    following = settings.list_save_steps(total_steps).count(max(there, default=0) + 1, total_steps - 1) + 1
    # A new one is whole before an old one goes.
    most = min(settings.keep_checkpoints + 1, len(there) + following)
    if size > free and settings.on_full_disk == "stop":
        storage.check_room(folder, int(size), "a checkpoint", "make room, or give another --checkpoint-path")
    if (wanted := max(most - len(there), 1) * size) > free:
        logger.warning(
            "{} has room for {}, and checkpoints are to take {} more: make room, or keep fewer than "
            "--keep-checkpoints {}",
            folder,
            storage.format_bytes(free),
            storage.format_bytes(int(wanted)),
            settings.keep_checkpoints,
        )


def _check_links(plan: PlannedRun, layout: Layout, hosts: list[str]) -> None:
    """Warn of a tensor group over several hosts, with the rate of its sums as measured for a moment."""
    first = layout.rank - layout.tensor_rank
    spans = len(set(hosts[first : first + layout.tensor_size])) > 1
    rates = layout.gather(_measure_sums(layout) if spans else None)
    if layout.rank or all(rate is None for rate in rates):
        return
    slowest = min(rate for rate in rates if rate is not None)
    sent = rank_traffic(plan, 0)
    size = 2 * sent["tensor"].bytes + sent["gathered"].bytes
    seconds = size * (plan.tensor_size - 1) / plan.tensor_size / slowest
    logger.warning(
        "a tensor group is spread over several hosts, whose link carries {:.3g} GB/s: its sums take {:.2g} s of each "
        "step; start a multiple of --tensor-group-size {} ranks on each host",
        slowest / 1e9,
        seconds,
        plan.tensor_size,
    )


def _measure_sums(layout: Layout) -> float:
    """Return the bytes a second each way of a rank, of the fastest of some sums over the tensor group."""
    numbers = torch.zeros(_PROBE, device=layout.device)
    best = float("inf")
    for _ in range(1 + _PROBES):  # the first connects
        hardware.synchronize(layout.device)
        started = time.perf_counter()
        dist.all_reduce(numbers, group=layout.tensor)
        hardware.synchronize(layout.device)
        best = min(best, time.perf_counter() - started)
    return 2 * (layout.tensor_size - 1) / layout.tensor_size * numbers.nbytes / best


def _format(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"
