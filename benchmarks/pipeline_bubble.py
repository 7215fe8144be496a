"""Step time of a pipeline on two cores against its ideal, for the schedules whose ideal has a formula.

    python benchmarks/pipeline_bubble.py

The ideal is the time one stage takes for the whole work on one core, halved, times 1 + (p - 1) / (m v): p ranks
of v stages that never wait but for the pipeline's filling and draining. Layers are cut so that all have the same work
(the head is replaced by a small vocabulary), since the figure is about the schedule and not about the balance.

The last two columns tell work from waiting: the processor time of the busiest rank's step, and the pages of memory that
it was given. What a step takes beyond its processor time is waiting: for the other rank, or for a core that something
else on the machine has.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import torch
from _random_tokens import RandomTokens

_STAGES = {"1f1b": 1, "gpipe": 1, "interleaved": 2}  # a rank


def build(ranks: int, rank: int, options: argparse.Namespace, schedule: str):
    from openchatkit.distributed.layout import make_layout, stage_layers, stage_numbers
    from openchatkit.models.registry import config_from_hf
    from openchatkit.models.stage import Stage
    from openchatkit.training.device import keep_freed_memory
    from openchatkit.training.learning_rates import LearningRates
    from openchatkit.training.local_stages import LocalStages
    from openchatkit.training.optimizer import build_optimizer
    from openchatkit.training.precision import LossScaler
    from openchatkit.training.schedules import SCHEDULES, resolve_stages
    from openchatkit.training.step import Schedule, Trainer
    from openchatkit.training.weights import Weights

    keep_freed_memory()
    raw = {
        "model_type": "gpt_neox",
        "vocab_size": 256,
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 8,
        "intermediate_size": 4 * options.width,
        "max_position_embeddings": options.seq_length,
    }
    device = torch.device("cpu")
    layout = make_layout(rank=rank, pipeline_size=ranks, device=device, timeout=timedelta(seconds=300))
    a_rank = resolve_stages(schedule, None, ranks)
    layers = stage_layers(options.layers, stages=ranks * a_rank, layers_per_stage=0)
    numbers = stage_numbers(rank, pipeline_size=ranks, stages_a_rank=a_rank, v_shaped=SCHEDULES[schedule].v_shaped)
    config = config_from_hf(raw)
    stages = LocalStages({n: Stage(config, *layers[n], embed=n == 0, head=n == len(layers) - 1) for n in numbers})
    for stage in stages:
        stage.init_weights(0)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    weights = Weights(stages, layout, dtype=dtype)
    weights.optimizer = build_optimizer("adamw", weights, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    rows = options.micro_batches * options.micro_batch_size
    return Trainer(
        weights,
        LossScaler(1.0, dynamic=False),
        Schedule(rows, 1, LearningRates(1e-4, 1000), 1000, 1.0),
        dtype=dtype,
        pp_mode=schedule,
        micro_batch_size=options.micro_batch_size,
        seq_length=options.seq_length,
    )


def rank_main(options: argparse.Namespace) -> None:
    from openchatkit.distributed import network, rendezvous

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {options.rank})
    device, timeout = torch.device("cpu"), timedelta(seconds=300)
    network.choose_interface(None, "127.0.0.1")
    if options.stages > 1:
        url = f"tcp://127.0.0.1:{options.port}"
        rendezvous.connect(url, rank=options.rank, world_size=options.stages, device=device, timeout=timeout)
    trainer = build(options.stages, options.rank, options, options.schedule)
    data, steps = RandomTokens(options.seq_length, vocabulary=256), []
    for number in range(options.steps + 2):
        before = used()
        trainer.step(number, data)
        steps.append([after - was for after, was in zip(used(), before, strict=True)])
    rendezvous.disconnect()
    print(json.dumps(steps[2:]))


def used() -> tuple[float, float, int]:
    """The clock, and what this process has had so far: seconds of a processor, and pages."""
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(stages: int, schedule: str, options: argparse.Namespace) -> list[tuple[float, float, int]]:
    """Each step's time, and its most processor time and pages of any rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--stages", str(stages), "--schedule", schedule, "--port", str(port)]
    for name in ("layers", "width", "seq-length", "micro-batches", "micro-batch-size", "steps"):
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    command += ["--bf16"] if options.bf16 else []
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(stages)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return [
        (steps[0][0], max(step[1] for step in steps), max(step[2] for step in steps))
        for steps in zip(*found, strict=True)
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after two that are not")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contestant")
    parser.add_argument("--bf16", action="store_true")
    for name in ("rank", "stages", "port"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--schedule", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.rank is not None:
        rank_main(options)
        return
    found = {name: [] for name in ("one stage, one core", *_STAGES)}
    for _ in range(options.rounds):
        found["one stage, one core"] += measure(1, "gpipe", options)
        for schedule in _STAGES:
            found[schedule] += measure(2, schedule, options)
    medians = {
        name: [statistics.median(column) for column in zip(*steps, strict=True)] for name, steps in found.items()
    }
    one = medians["one stage, one core"]
    print(f"{options.layers} layers, width {options.width}, {options.micro_batches} micro-batches of ", end="")
    print(f"{options.micro_batch_size} x {options.seq_length}, {'bfloat16' if options.bf16 else 'float32'}\n")
    print("| what | step | ideal | over it | processor time | new pages |")
    print("|-|-|-|-|-|-|")
    print(f"| one stage, one core | {one[0] * 1e3:.0f} ms | | | {one[1] * 1e3:.0f} ms | {one[2]:.0f} |")
    for schedule, stages in _STAGES.items():
        step, processor, pages = medians[schedule]
        ideal = one[0] / 2 * (1 + 1 / (options.micro_batches * stages))
        print(
            f"| {schedule}, {stages} a rank | {step * 1e3:.0f} ms | {ideal * 1e3:.0f} ms | {step / ideal - 1:+.1%} ",
            end="",
        )
        print(f"| {processor * 1e3:.0f} ms | {pages:.0f} |")


if __name__ == "__main__":
    main()
