"""Runs over two machines: what one of them finds ends both, and a partition ends both until it is over.

The machines are two network namespaces joined by a cable (veth), where the tests may make these.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
from test_layouts import assert_same_bits, run

from openchatkit.formats import checkpoint, metrics
from openchatkit.paths import ROOT

HEARTBEAT = 6
ADDRESSES = ("10.78.0.1", "10.78.0.2")
# An address of the link layer that nobody has: what is sent to it is lost without a word, as in a partition.
NOWHERE = "02:00:00:00:00:99"


def test_a_mistake_that_one_machine_finds_before_the_ranks_meet_ends_all(tmp_path, flags):
    missing = tmp_path / "only on the other machine.jsonl"
    ended = ranks.train(
        tmp_path,
        {**flags, "pipeline_group_size": 2, "checkpoint_path": tmp_path / "ckpt"},
        world_size=2,
        own={1: {"task_name": missing}},
        environment={"LOCAL_WORLD_SIZE": "1"},
    )
    assert ended.statuses == [2, 2], ended.errors
    for errors in ended.errors:
        [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: rank 1 on {socket.gethostname()}: ")
        assert str(missing) in line


@dataclass(frozen=True)
class Machines:
    """Two network namespaces, and how to cut and mend what joins them."""

    names: tuple[str, str]

    def command(self, number: int, *words: object) -> list[str]:
        return ["ip", "netns", "exec", self.names[number], *map(str, words)]

    def cut(self) -> None:
        for number, other in ((0, 1), (1, 0)):
            ip(number, self.names, "neigh", "replace", ADDRESSES[other], "lladdr", NOWHERE, "nud", "permanent")

    def mend(self) -> None:
        for number, other in ((0, 1), (1, 0)):
            ip(number, self.names, "neigh", "del", ADDRESSES[other])


def ip(number: int, names: tuple[str, str], *words: str) -> None:
    device = () if words[0] == "link" else ("dev", f"cable{number}")
    subprocess.run(["ip", "-n", names[number], *words, *device], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    names = (f"kit{os.getpid()}a", f"kit{os.getpid()}b")
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ends = ["cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1]]
            subprocess.run(["ip", "link", "add", *ends], check=True, capture_output=True)
            for number in (0, 1):
                ip(number, names, "addr", "add", f"{ADDRESSES[number]}/24")
                ip(number, names, "link", "set", "lo", "up")
                ip(number, names, "link", "set", f"cable{number}", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        yield Machines(names)


RUN = {"total_steps": 150, "checkpoint_steps": 20, "pipeline_group_size": 2}


def train_over_machines(
    folder: Path, flags: dict, machines: Machines, launch: Callable[[int], list[object]]
) -> list[subprocess.Popen]:
    """Start both machines' ranks; their output goes to folder/machine_0 and machine_1."""
    arguments = ranks.to_argv({**flags, "heartbeat_timeout": HEARTBEAT, "checkpoint_path": folder / "ckpt"})
    processes = []
    for number in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{number}"}
        with open(folder / f"machine_{number}", "w") as output:
            command = machines.command(number, *launch(number), ROOT / "training" / "dist_clm_train.py", *arguments)
            processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
    return processes


def read_output(folder: Path) -> list[str]:
    return [(folder / f"machine_{number}").read_text() for number in range(2)]


def wait_until(condition: Callable[[], bool], folder: Path, seconds: float = 240) -> float:
    """Wait for a condition; returns the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "\n---\n".join(read_output(folder))
        time.sleep(0.05)
    return time.monotonic() - start


def reached(folder: Path, step: int) -> bool:
    return any(row["step"] >= step for row in metrics.read(folder / "ckpt"))


def launch_by_launcher(number: int) -> list[object]:
    flags = ["--world-size", 2, "--first-rank", number, "--ranks-here", 1, "--max-restarts", 3]
    return [sys.executable, ROOT / "training" / "launch.py", *flags]


def launch_by_torchrun(number: int) -> list[object]:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "kit", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500"]
    # Else torchrun finds out by the address of the host name, which both namespaces share.
    meeting += ["--rdzv-conf", f"is_host={'false' if number else 'true'}"]
    sizes = ["--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3, "--local-addr", ADDRESSES[number]]
    return [sys.executable, "-m", "torch.distributed.run", *sizes, *meeting]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["launcher", "torchrun"])
def test_a_partition_ends_both_machines_and_both_go_on_after_it(tmp_path, flags, machines, way):
    launch = {"launcher": launch_by_launcher, "torchrun": launch_by_torchrun}[way]
    own = {"dist_url": f"tcp://{ADDRESSES[0]}:7033"} if way == "launcher" else {}
    expected = run(tmp_path / "unstopped", flags, **RUN)
    processes = train_over_machines(tmp_path, {**flags, **RUN, **own, "use_cuda": "false"}, machines, launch)
    try:
        wait_until(lambda: reached(tmp_path, 50) or any(process.poll() for process in processes), tmp_path)
        machines.cut()
        silence = f"gave no sign of life for {HEARTBEAT} s after step "
        wait_until(lambda: all(silence in text for text in read_output(tmp_path)), tmp_path, 120)
        machines.mend()
        for process in processes:
            process.wait(400)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
    texts = read_output(tmp_path)
    assert [process.returncode for process in processes] == [0, 0], "\n---\n".join(texts)
    host = socket.gethostname()
    assert f"rank 1 on {host} (pipeline rank 1 of 2) {silence}" in texts[0]
    assert f"rank 0 on {host} (pipeline rank 0 of 2) {silence}" in texts[1]
    assert_same_bits(expected, checkpoint.latest(tmp_path / "ckpt"))
