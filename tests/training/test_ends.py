"""Ends of whole runs under the launcher: killed and frozen ranks in several layouts, restarts, and SIGTERM."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ranks
from test_layouts import assert_same_bits, run

from openchatkit.formats import checkpoint, metrics
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.shards import shard_names
from openchatkit.paths import ROOT

pytestmark = pytest.mark.long

HEARTBEAT = 5
GRID = {"pipeline_group_size": 2, "data_group_size": 2, "batch_size": 4, "pp_mode": "interleaved", "dp_mode": "sharded"}
PARTS = {"tensor_group_size": 2, "pipeline_group_size": 2}
ENDLESS = {"total_steps": 100_000, "checkpoint_steps": 10, "heartbeat_timeout": HEARTBEAT}

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path, flags) -> Iterator[Start]:
    """Start the launcher on the trainer; stderr of all goes to a file, and checkpoints to tmp_path/ckpt."""
    started = []

    def start_launcher(change: dict, *launcher_flags: object, world_size: int) -> subprocess.Popen:
        url = f"tcp://127.0.0.1:{ranks.free_port()}"
        given = {**flags, "checkpoint_path": tmp_path / "ckpt", "dist_url": url, "use_cuda": "false", **change}
        launcher = [sys.executable, ROOT / "training" / "launch.py", "--world-size", world_size, *launcher_flags]
        with open(tmp_path / "stderr", "w") as errors:
            process = subprocess.Popen(
                [*map(str, launcher), str(ROOT / "training" / "dist_clm_train.py"), *ranks.to_argv(given)],
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        started.append(process)
        return process

    yield start_launcher
    for process in started:
        process.kill()  # its guard kills the ranks
        process.wait()


def errors_of(folder: Path) -> str:
    return (folder / "stderr").read_text()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 200
    while not any(row["step"] >= step for row in metrics.read(folder / "ckpt")):
        assert process.poll() is None, errors_of(folder)
        assert time.monotonic() < limit, errors_of(folder)
        time.sleep(0.01)


def pid_of(launcher: subprocess.Popen, rank: int) -> int:
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid), "-f", f"[-]-rank {rank} "], capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.parametrize(
    ("change", "victim", "place"),
    [
        (GRID, 0, "pipeline rank 0 of 2, replica 0 of 2"),
        (GRID, 3, "pipeline rank 1 of 2, replica 1 of 2"),
        (PARTS, 1, "pipeline rank 0 of 2, tensor rank 1 of 2"),
    ],
    ids=["grid-0", "grid-3", "parts-1"],
)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_rank_at_fault_is_named_in_one_line(start, tmp_path, change, victim, place, sign):
    process = start({**ENDLESS, **change}, world_size=4)
    wait_for_step(tmp_path, 3, process)
    time.sleep(2.5)  # until a beat has said that steps are being taken
    os.kill(pid_of(process, victim), sign)
    killed = time.monotonic()
    status = process.wait(120)
    errors = errors_of(tmp_path)
    fate = "died in" if sign == signal.SIGKILL else f"gave no sign of life for {HEARTBEAT} s after"
    line = f"rank {victim} on {socket.gethostname()} ({place}) {fate} step "
    assert len({found for found in errors.splitlines() if line in found}) == 1, errors
    assert status == (1 if sign == signal.SIGKILL else 75), errors
    assert "Traceback" not in errors
    print(f"{fate}: {time.monotonic() - killed:.1f} s")


def test_a_run_whose_ranks_are_killed_restarts_and_ends_in_the_bits_of_one_that_ran_through(start, tmp_path, flags):
    change = {"pipeline_group_size": 2, "pp_mode": "1f1b", "total_steps": 400, "checkpoint_steps": 20}
    expected = run(tmp_path / "unstopped", flags, **change)
    process = start(change, "--max-restarts", 1, "--restart-delay", 0.1, world_size=2)
    for number, victim in enumerate((1, 0, 1)):
        # Each time after a new checkpoint: without one the second restart would be one too many.
        wait_for_step(tmp_path, 30 + 60 * number, process)
        os.kill(pid_of(process, victim), signal.SIGKILL)
        limit = time.monotonic() + 60
        while errors_of(tmp_path).count("starting all ranks again") <= number:
            assert time.monotonic() < limit, errors_of(tmp_path)
            time.sleep(0.05)
    assert process.wait(250) == 0, errors_of(tmp_path)
    assert errors_of(tmp_path).count("(restart 1 of 1 without a new checkpoint)") == 3
    assert_same_bits(expected, checkpoint.latest(tmp_path / "ckpt"))


def test_sigterm_ends_with_75_and_a_verified_checkpoint_within_30_seconds(start, tmp_path):
    process = start({**ENDLESS, **GRID, "checkpoint_steps": 0}, world_size=4)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75, errors_of(tmp_path)
    [step] = re.findall(r"error: stopped after step (\d+) of 100000, which is saved", errors_of(tmp_path))
    path = checkpoint.latest(tmp_path / "ckpt")
    assert path.name == f"checkpoint_{step}"
    checkpoint.verify(path, shard_names(LayerShards(path).config.num_layers))
