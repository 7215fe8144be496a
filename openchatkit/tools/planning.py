"""The command `tools/plan_training.py`: whether a layout fits, what it sends, and how long a step would take.

Owns flags, the estimate of times and tables; all counts are `training.plan`'s. Nothing is measured and nothing started.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.training.config import RECOMPUTING, parse_recomputing
from openchatkit.training.schedules import SCHEDULES

if TYPE_CHECKING:
    from openchatkit.models.config import ModelConfig
    from openchatkit.training.plan.planned_run import PlannedRun

_GIB, _GB, _TERA = 1 << 30, 1e9, 1e12
_SUGGESTIONS = 5
_MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Machines:
    """Measured or published rates: operations a second of a card, bytes a second each way of a card's links."""

    operations: float
    link: float
    local: float
    cards_a_host: int

    def link_of(self, ranks: int) -> float:
        """Return the rate of the slowest link among that many ranks in a row, which start at a multiple of it."""
        within = ranks <= self.cards_a_host and self.cards_a_host % ranks == 0
        return self.local if within else self.link


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on. Nothing overlaps."""

    products: float
    tensor: float
    pipeline: float
    waiting: float
    replicas: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(vars(self).values())


def estimate(run: "PlannedRun", machines: Machines) -> StepTime:
    """Return the time of a step of the busiest rank, which the others wait for."""
    from openchatkit.training.plan import traffic, work

    parts, of_replica = run.tensor_size, run.tensor_size * run.pipeline_size
    busiest = (0.0, 0.0, 0.0)
    reducing = 0.0
    for rank in range(run.pipeline_size):
        sent = traffic.rank_traffic(run, rank)
        products = work.rank_operations(run, rank) / machines.operations
        tensor = 2 * (parts - 1) / parts * sent["tensor"].bytes / machines.link_of(parts)
        pipeline = sent["pipeline"].bytes / machines.link_of(of_replica)
        busiest = max(busiest, (products, tensor, pipeline), key=sum)
        # An all-reduce passes each byte on twice, a reduction to one replica or a broadcast once.
        passed_on = 2 * (run.replicas - 1) / run.replicas if run.dp_mode == "allreduce" else 1
        reducing = max(reducing, passed_on * sent["data"].bytes / machines.link_of(run.world_size))
    share = work.bubble(run)
    return StepTime(*busiest, waiting=sum(busiest) * share / (1 - share), replicas=reducing)


def fullest_rank(run: "PlannedRun") -> int:
    """Return the pipeline rank that holds most; the first rank of its tensor group does."""
    from openchatkit.training.plan import memory

    return max(range(run.pipeline_size), key=lambda rank: memory.rank_bytes(run, rank).total)


def suggest(config: "ModelConfig", options: argparse.Namespace, machines: Machines, room: float) -> list["PlannedRun"]:
    """Return the layouts of --cards whose best settings are fastest, of those that fit into `room` bytes."""
    from openchatkit.training.plan import memory

    found: dict[tuple[int, int, int], PlannedRun] = {}
    candidates = sorted(
        ((estimate(run, machines).total, number, run) for number, run in enumerate(_candidates(config, options))),
        key=lambda each: each[:2],
    )
    for _, _, run in candidates:
        layout = (run.pipeline_size, run.replicas, run.tensor_size)
        if layout not in found and memory.rank_bytes(run, fullest_rank(run)).total <= room:
            found[layout] = run
            if len(found) == _SUGGESTIONS:
                break
    return list(found.values())


def _candidates(config: "ModelConfig", options: argparse.Namespace) -> Iterator["PlannedRun"]:
    for parts, pipeline_size in itertools.product(_divisors(options.cards_a_host), _divisors(options.cards)):
        replicas, rest = divmod(options.cards, parts * pipeline_size)
        if rest or pipeline_size > config.num_layers or options.global_batch % replicas:
            continue
        if parts > 1 and options.optimizer == "8bit-adam":
            continue
        kinds = [("gpipe", 1)] if pipeline_size == 1 else [("1f1b", 1), *(("interleaved", v) for v in (2, 3, 4))]
        rows = options.global_batch // replicas
        for (schedule, stages), size, recompute in itertools.product(kinds, _MICRO_BATCH_SIZES, RECOMPUTING):
            if rows % size or stages * pipeline_size > config.num_layers:
                continue
            for accumulate in _divisors(rows // size):
                run = argparse.Namespace(**vars(options))
                run.pipeline_group_size, run.data_group_size, run.tensor_group_size = pipeline_size, replicas, parts
                run.pp_mode, run.stages_per_rank, run.micro_batch_size = schedule, stages, size
                run.gradient_accumulate_step, run.batch_size = accumulate, rows // accumulate
                run.activation_checkpointing = recompute
                try:
                    yield plan_run(config, run)
                except UserError:  # a model that has no such parts, or a schedule that has no such number of batches
                    continue


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def plan_run(config: "ModelConfig", args: argparse.Namespace) -> "PlannedRun":
    """Return the run that the flags describe; UserError for what training would refuse as well."""
    from openchatkit.distributed.layout import balanced_layers, stage_layers
    from openchatkit.models.cuts import check_parts
    from openchatkit.training import schedules
    from openchatkit.training.plan import planned_run, work

    check_parts(config, args.tensor_group_size)
    if args.seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {args.seq_length}: the model was made for at most {config.max_position_embeddings} tokens"
        )
    if args.batch_size % args.micro_batch_size:
        raise UserError(
            f"--batch-size {args.batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size}"
        )
    if args.tensor_group_size > 1 and args.optimizer == "8bit-adam":
        raise UserError(
            "--optimizer 8bit-adam and --tensor-group-size exclude each other: use --optimizer adamw, or stages in "
            "place of tensor groups"
        )
    pipeline_size, micro_batches = args.pipeline_group_size, args.batch_size // args.micro_batch_size
    stages = pipeline_size * schedules.resolve_stages(args.pp_mode, args.stages_per_rank, pipeline_size)
    schedules.check_schedule(
        args.pp_mode,
        pipeline_size=pipeline_size,
        micro_batches=micro_batches,
        batch=f"--batch-size {args.batch_size} / --micro-batch-size {args.micro_batch_size}",
        recompute=args.activation_checkpointing != "none",
    )
    layers = stage_layers(config.num_layers, stages=stages, layers_per_stage=args.num_layers)
    run = planned_run.PlannedRun(
        config=config,
        layers=tuple(layers),
        pipeline_size=pipeline_size,
        replicas=args.data_group_size,
        tensor_size=args.tensor_group_size,
        schedule=args.pp_mode,
        micro_batches=micro_batches,
        micro_batch_size=args.micro_batch_size,
        accumulate=args.gradient_accumulate_step,
        seq_length=args.seq_length,
        precision=args.precision,
        recompute=args.activation_checkpointing != "none",
        selective=args.activation_checkpointing == "selective",
        dp_mode=args.dp_mode,
        optimizer=args.optimizer,
    )
    if args.balance == "even" or args.num_layers:
        return run
    return replace(run, layers=tuple(balanced_layers(config.num_layers, stages=stages, head=work.head_cost(run))))


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Print what the flags' layout takes, or the best layouts."""
    args = _parser().parse_args(argv)
    machines = _machines(args)
    config = _read_model(args)
    if not args.suggest:
        _print_plan(plan_run(config, args), args, machines)
        return
    missing = [
        flag
        for flag, value in (
            ("--cards", args.cards),
            ("--global-batch", args.global_batch),
            ("--memory", args.memory),
            ("--flops", machines),
        )
        if value is None
    ]
    if missing or machines is None:
        raise UserError(f"--suggest compares layouts by memory and time, and needs {', '.join(missing)} as well")
    runs = suggest(config, args, machines, args.memory * _GIB)
    if not runs:
        raise UserError(
            f"no layout of --cards {args.cards} with --global-batch {args.global_batch} fits into --memory "
            f"{args.memory:g}: give more cards, --dp-mode sharded, or a global batch that more numbers divide"
        )
    _print_suggestions(runs, machines)
    _print_assumptions(machines)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="tools/plan_training.py",
        description="Compute what training takes on a layout: memory, messages and, from given rates, time.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-name", type=Path, help="folder with the model's config.json")
    model.add_argument("--config", type=Path, help="or such a file itself")
    layout = parser.add_argument_group("layout, as training has it")
    layout.add_argument("--pipeline-group-size", type=cli.positive_int, default=1, help="ranks that share the layers")
    layout.add_argument("--data-group-size", type=cli.positive_int, default=1, help="replicas")
    layout.add_argument("--tensor-group-size", type=cli.positive_int, default=1, help="ranks that share each layer")
    layout.add_argument("--pp-mode", choices=SCHEDULES, default="gpipe", help="schedule")
    layout.add_argument("--stages-per-rank", type=cli.positive_int, help="of schedules that take several")
    layout.add_argument("--num-layers", type=cli.natural, default=0, help="layers a stage; 0: as --balance says")
    layout.add_argument(
        "--balance", choices=("even", "auto"), default="even", help="auto: by the head's operations, not measured here"
    )
    layout.add_argument("--dp-mode", choices=("allreduce", "sharded"), default="allreduce", help="state of replicas")
    step = parser.add_argument_group("a step, as training has it")
    step.add_argument("--batch-size", type=cli.positive_int, default=32, help="rows that a replica puts through")
    step.add_argument("--micro-batch-size", type=cli.positive_int, default=8, help="rows of a micro-batch")
    step.add_argument("--gradient-accumulate-step", type=cli.positive_int, default=1, help="batches a step")
    step.add_argument("--seq-length", type=cli.positive_int, default=2048, help="tokens of a row")
    step.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of products")
    step.add_argument(
        "--activation-checkpointing", type=parse_recomputing, default="full", help="none, full, selective"
    )
    step.add_argument("--optimizer", choices=("adam", "adamw", "8bit-adam"), default="adamw", help="optimizer")
    rates = parser.add_argument_group("machines")
    rates.add_argument("--memory", type=cli.positive_float, help="GiB of a card that tensors can have")
    rates.add_argument("--flops", type=cli.positive_float, help="TFLOP/s that a card reaches in training, measured")
    rates.add_argument("--link-gbs", type=cli.positive_float, help="GB/s each way of a card between hosts")
    rates.add_argument("--local-gbs", type=cli.positive_float, help="GB/s each way of a card within a host")
    rates.add_argument("--cards-a-host", type=cli.positive_int, default=8, help="cards of a host")
    best = parser.add_argument_group("suggestions")
    best.add_argument("--suggest", action="store_true", help=f"list the {_SUGGESTIONS} fastest layouts that fit")
    best.add_argument("--cards", type=cli.positive_int, help="cards to lay out")
    best.add_argument("--global-batch", type=cli.positive_int, help="rows of a step, over all replicas")
    return parser


def _machines(args: argparse.Namespace) -> Machines | None:
    """Return the rates; None without --flops, UserError where the others are missing."""
    if args.flops is None:
        return None
    missing = [flag for flag, value in (("--link-gbs", args.link_gbs), ("--local-gbs", args.local_gbs)) if not value]
    if missing:
        raise UserError(f"--flops asks for an estimate of time, which needs {' and '.join(missing)} as well")
    return Machines(args.flops * _TERA, args.link_gbs * _GB, args.local_gbs * _GB, args.cards_a_host)


def _read_model(args: argparse.Namespace) -> "ModelConfig":
    from openchatkit.formats import layer_shards
    from openchatkit.formats.tokenizer_files import read_json
    from openchatkit.models.registry import config_from_hf

    if args.config is not None:
        return config_from_hf(read_json(args.config))
    return layer_shards.read_config(args.model_name)[1]


def _print_plan(run: "PlannedRun", args: argparse.Namespace, machines: Machines | None) -> None:
    from openchatkit.training.plan import memory, parameters, traffic, work

    counts = [parameters.count_rank(run, rank).elements for rank in range(run.pipeline_size)]
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
    print(f"waiting by the schedule itself: {work.bubble(run):.1%} of a step")
    rank = fullest_rank(run)
    held = memory.rank_bytes(run, rank)
    print(f"\nmemory of the fullest rank, pipeline rank {rank}, with {counts[rank]:,} parameters:")
    for kind, size in vars(held).items():
        print(f"  {kind.replace('_', ' '):16} {size / _GIB:9.2f} GiB")
    verdict = ""
    if args.memory:
        fits = held.total <= args.memory * _GIB
        verdict = f"  {'fits into' if fits else 'DOES NOT FIT into'} {args.memory:g} GiB"
    print(f"  {'total':16} {held.total / _GIB:9.2f} GiB{verdict}")
    print(f"\nmessages and sums of a step, pipeline rank {rank}:")
    for kind, each in traffic.rank_traffic(run, rank).items():
        if each.messages and kind != "received":
            print(f"  {kind:16} {each.messages:9,} of {each.bytes / _GB:9.3f} GB together")
    if machines is not None:
        _print_time(run, machines)
        _print_assumptions(machines)


def _print_time(run: "PlannedRun", machines: Machines) -> None:
    step = estimate(run, machines)
    print("\nestimated step:")
    for kind, seconds in vars(step).items():
        print(f"  {kind:16} {seconds:9.3f} s")
    print(f"  {'total':16} {step.total:9.3f} s = {run.step_tokens / step.total / run.world_size:,.0f} tokens/s a card")


def _print_suggestions(runs: Sequence["PlannedRun"], machines: Machines) -> None:
    from openchatkit.training.plan import memory, work

    names = ("pipeline", "replicas", "tensor", "schedule", "stages", "micro-batches", "recompute", "GiB", "waiting")
    rows = [(*names, "step", "tokens/s a card")]
    for run in runs:
        seconds = estimate(run, machines).total
        batches = f"{run.accumulate} x {run.micro_batches} of {run.micro_batch_size}"
        rows.append(
            (
                str(run.pipeline_size),
                str(run.replicas),
                str(run.tensor_size),
                run.schedule,
                str(run.stages_a_rank),
                batches,
                RECOMPUTING[run.recompute + (run.recompute and not run.selective)],
                f"{memory.rank_bytes(run, fullest_rank(run)).total / _GIB:.1f}",
                f"{work.bubble(run):.1%}",
                f"{seconds:.2f} s",
                f"{run.step_tokens / seconds / run.world_size:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _print_assumptions(machines: Machines) -> None:
    print(
        f"""
assumptions:
  every card computes at {machines.operations / _TERA:g} TFLOP/s, whatever the sizes of its products
  each card has its own link: {machines.link / _GB:g} GB/s each way between hosts, {machines.local / _GB:g} within one
  hosts have {machines.cards_a_host} cards, with consecutive ranks; the slowest link of a group decides
  nothing is sent while a card computes; no message waits for its turn or has a latency
  an all-reduce passes each byte on twice, a reduction or a broadcast once
  backward takes twice as long as forward, and what is recomputed is taken twice
  the optimizer's update, the data and checkpoints take no time"""
    )


def _describe_runs(numbers: Sequence[int]) -> str:
    """Return `2 x 6, 5`: how often each number comes in a row."""
    runs = [(number, len(list(group))) for number, group in itertools.groupby(numbers)]
    return ", ".join(str(number) if count == 1 else f"{count} x {number}" for number, count in runs)
