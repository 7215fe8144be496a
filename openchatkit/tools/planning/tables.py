"""Tables of a plan, as `tools/plan_training.py` prints them."""

import itertools
from collections.abc import Sequence

from openchatkit.tools.planning.settings import GIB, PlanSettings
from openchatkit.training.config import RECOMPUTING
from openchatkit.training.plan import memory, work
from openchatkit.training.plan.parameters import count_rank
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.times import Machines, estimate
from openchatkit.training.plan.traffic import rank_traffic

_GB, _TERA = 1e9, 1e12


def print_run(run: PlannedRun) -> None:
    """Print the model, its layout and a step."""
    print(f"model: {run.config.num_layers} layers of width {run.config.hidden_size}, {run.config.family}")
    print(
        f"layout: {run.world_size:,} ranks = {run.pipeline_size} in a pipeline x {run.replicas} replicas x "
        f"{run.tensor_size} in a tensor group; {run.schedule}, stages a rank: {run.stages_a_rank}"
    )
    print(
        f"step: {run.step_tokens // run.seq_length:,} rows of {run.seq_length:,} = {run.step_tokens:,} tokens; in each "
        f"pipeline {run.accumulate} x {run.micro_batches} micro-batches, each of rows: {run.micro_batch_size}"
    )
    print(f"layers of stages: {_describe_runs([last - first for first, last in run.layers])}")
    print(
        f"waiting by the schedule itself: {work.bubble(run):.1%} of a step; with uneven stages: "
        f"{work.idle_share(run):.1%}"
    )


def print_memory(run: PlannedRun, settings: PlanSettings) -> None:
    """Print what the fullest rank holds, and whether it fits where that is known."""
    rank = memory.fullest_rank(run)
    held = memory.rank_bytes(run, rank)
    parameters = count_rank(run, rank).elements
    print(f"\nmemory of the fullest rank, pipeline rank {rank}, with {parameters:,} parameters:")
    for kind, size in vars(held).items():
        print(f"  {kind.replace('_', ' '):16} {size / GIB:9.2f} GiB")
    verdict = ""
    if settings.cards is not None and settings.room is not None:
        fits = held.total <= settings.room
        verdict = (
            f"  {'fits into' if fits else 'DOES NOT FIT into'} {settings.cards.memory / GIB:g} GiB less "
            f"{settings.spare:g} to spare"
        )
    print(f"  {'total':16} {held.total / GIB:9.2f} GiB{verdict}")
    if settings.compile is not None:
        print("  --compile keeps other states than those counted: take the total as an upper bound")
    if run.offload or run.activation_offload:
        _print_main_memory(run, settings)
    print(f"a checkpoint: {memory.checkpoint_bytes(run) / _GB:.2f} GB; --keep-checkpoints {settings.keep_checkpoints}")


def _print_main_memory(run: PlannedRun, settings: PlanSettings) -> None:
    ranks = min(settings.cards_a_host, run.world_size)
    of_host = ranks * max(memory.main_memory_bytes(run, rank) for rank in range(run.pipeline_size))
    verdict = ""
    if settings.host_memory is not None:
        fits = of_host <= settings.host_memory * GIB
        verdict = f"  {'fits into' if fits else 'DOES NOT FIT into'} {settings.host_memory:g} GiB"
    print(f"main memory of a host with {ranks} such ranks: {of_host / GIB:.2f} GiB{verdict}")


def print_messages(run: PlannedRun) -> None:
    """Print what the fullest rank sends in a step."""
    rank = memory.fullest_rank(run)
    print(f"\nmessages and sums of a step, pipeline rank {rank}:")
    for kind, sent in rank_traffic(run, rank).items():
        if sent.messages and kind != "received":
            print(f"  {kind:16} {sent.messages:9,} of {sent.bytes / _GB:9.3f} GB together")


def print_time(run: PlannedRun, settings: PlanSettings, machines: Machines) -> None:
    """Print the seconds of a step, and when the run is done."""
    step = estimate(run, machines)
    print("\nestimated step:")
    for kind, seconds in vars(step).items():
        print(f"  {kind:16} {seconds:9.3f} s")
    print(f"  {'total':16} {step.total:9.3f} s = {run.step_tokens / step.total / run.world_size:,.0f} tokens/s a card")
    if settings.total_steps is not None:
        print(f"  {settings.total_steps:,} steps: {settings.total_steps * step.total / 3600:,.1f} hours")


def print_suggestions(runs: Sequence[PlannedRun], machines: Machines) -> None:
    """Print layouts, one a line."""
    names = ("pipeline", "replicas", "tensor", "schedule", "stages", "micro-batches", "recompute", "GiB", "waiting")
    rows = [(*names, "step", "tokens/s a card")]
    for run in runs:
        seconds = estimate(run, machines).total
        rows.append(
            (
                str(run.pipeline_size),
                str(run.replicas),
                str(run.tensor_size),
                run.schedule,
                str(run.stages_a_rank),
                f"{run.accumulate} x {run.micro_batches} of {run.micro_batch_size}",
                RECOMPUTING[run.recompute + (run.recompute and not run.selective)],
                f"{memory.rank_bytes(run, memory.fullest_rank(run)).total / GIB:.1f}",
                f"{work.bubble(run):.1%}",
                f"{seconds:.2f} s",
                f"{run.step_tokens / seconds / run.world_size:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def print_assumptions(machines: Machines) -> None:
    """Print what the times take for granted."""
    print(
        f"""
assumptions:
  every card computes at {machines.operations / _TERA:g} TFLOP/s, whatever the sizes of its products
  each card has its own link: {machines.link / _GB:g} GB/s each way between hosts, {machines.local / _GB:g} within one
  hosts have {machines.cards_a_host} cards, with consecutive ranks; the slowest link of a group decides
  nothing is sent while a card computes; no message waits for its turn or has a latency
  an all-reduce passes each byte on twice; a reduction, a broadcast, a gather or a scatter once
  backward takes twice as long as forward, and what is recomputed is taken twice
  the optimizer's update, the data and checkpoints take no time"""
    )


def _describe_runs(numbers: Sequence[int]) -> str:
    """Return `2 x 6, 5`: how often each number comes in a row."""
    runs = [(number, len(list(group))) for number, group in itertools.groupby(numbers)]
    return ", ".join(str(number) if count == 1 else f"{count} x {number}" for number, count in runs)
