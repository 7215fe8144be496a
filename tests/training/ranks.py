"""Real ranks for tests: the training command in one process a rank, over gloo, started from a server that has imported
torch already, so that a run of four ranks takes a second and not twenty."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from forkserver import context

from openchatkit.libraries import pytorch
from openchatkit.training.schedules import SCHEDULES


@dataclass
class Ended:
    """How a run ended: each rank's exit status and what it wrote to stderr."""

    statuses: list[int]
    errors: list[str]


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    folder: Path,
    flags: dict[str, object],
    *,
    world_size: int,
    environment: dict[str, str] | None = None,
    workplace: Path | None = None,
    own: dict[int, dict[str, object]] | None = None,
    before_main: Callable[[], None] | None = None,
) -> list:
    """Start every rank of a run, in the folder `workplace`; stderr of rank r goes to folder/stderr_r.

    `own` flags are given to one rank only, in place of those of all. Each rank calls `before_main` before the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"dist_url": f"tcp://127.0.0.1:{free_port()}", "use_cuda": "false", "timeout": 60, **flags}
    processes = []
    for rank in range(world_size):
        argv = to_argv({"world_size": world_size, **flags, **(own or {}).get(rank, {}), "rank": rank})
        errors = folder / f"stderr_{rank}"
        errors.write_text("")  # also for a rank that is killed before it writes anything
        process = context.Process(target=_rank, args=(argv, errors, environment or {}, workplace, before_main))
        process.start()
        processes.append(process)
    return processes


def finish(folder: Path, processes: list, *, seconds: float = 120) -> Ended:
    """Wait for all ranks; after `seconds` they are killed, with the status -9."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    errors = [(folder / f"stderr_{rank}").read_text() for rank in range(len(processes))]
    return Ended([process.exitcode for process in processes], errors)


def train(folder: Path, flags: dict[str, object], *, world_size: int = 1, **options: object) -> Ended:
    """Run the training command on all ranks and wait for them; skip the test where torch lacks the schedule."""
    schedule = SCHEDULES.get(str(flags.get("pp_mode")))
    if schedule and schedule.v_shaped and not pytorch.runs_v_schedules():
        pytest.skip(f"this torch does not run {flags['pp_mode']}")
    return finish(folder, start(folder, flags, world_size=world_size, **options))


def to_argv(flags: dict[str, object]) -> list[str]:
    """{"batch_size": 8, "bf16": True} -> ["--batch-size", "8", "--bf16"]; None leaves a flag out."""
    argv = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv += [flag, str(value)]
    return argv


def _rank(
    argv: list[str],
    errors: Path,
    environment: dict[str, str],
    workplace: Path | None,
    before_main: Callable[[], None] | None,
) -> None:
    with open(errors, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        os.chdir(workplace or os.curdir)
        import torch

        from openchatkit.training.command import main

        torch.set_num_threads(1)
        if before_main is not None:
            before_main()
        try:
            main(argv)
        except SystemExit as ended:
            sys.exit(ended.code)
