"""Killed, stopped or moved to another layout, a run ends as if nothing had happened."""

import os
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
from test_layouts import assert_same_bits, run, tensors

from openchatkit.formats import checkpoint, metrics

STAGES = {"pipeline_group_size": 2, "pp_mode": "1f1b"}
LONG = {"total_steps": 8, "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, flags):
    """Eight steps over two stages without a break."""
    return run(tmp_path_factory.mktemp("unstopped"), flags, **LONG, **STAGES)


def wait_for_step(folder: Path, step: int, processes: list) -> None:
    limit = time.monotonic() + 60
    while not any(row["step"] >= step for row in metrics.read(folder)):
        assert time.monotonic() < limit, "no such step within a minute"
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def stopped_at(
    folder: Path, flags: dict, step: int, sign: int, *, victims: list[int], world_size: int = 2
) -> ranks.Ended:
    """Start a run that would take very long, and send a signal to some of its ranks after a step."""
    flags = {**flags, "checkpoint_path": folder / "ckpt"}
    processes = ranks.start(folder, flags, world_size=world_size)
    wait_for_step(folder / "ckpt", step, processes)
    for victim in victims:
        os.kill(processes[victim].pid, sign)
    return ranks.finish(folder, processes)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_and_resumed_gives_the_same_bits(tmp_path, flags, unstopped, victim):
    """Total steps decide the learning rate, so the killed run has the same; slow steps let the kill come in between."""
    slow = {"environment": {"OPENCHATKIT_TEST_SLOW": "1"}}
    del slow
    ended = stopped_at(tmp_path, {**flags, **LONG, **STAGES}, 3, signal.SIGKILL, victims=[victim])
    assert ended.statuses[victim] == -signal.SIGKILL
    assert ended.statuses[1 - victim] in (75, 0)
    again = run(tmp_path, flags, **LONG, **STAGES)
    assert_same_bits(unstopped, again)
    assert [row["step"] for row in metrics.read(again.parent)] == list(range(1, 9))
