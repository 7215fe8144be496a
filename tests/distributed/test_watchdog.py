"""watchdog.py on real ranks: one that dies, freezes, fails or is late ends the other, whatever its main thread does."""

import asyncio
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from openchatkit.cli import command
from openchatkit.distributed import network, rendezvous, watchdog
from openchatkit.distributed.beat_server import BeatServer
from openchatkit.distributed.layout import Layout, make_layout
from openchatkit.errors import UserError

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "openchatkit.training.setup"])

HOST = socket.gethostname()
SILENCE = 4.0  # much longer than a thread waits for its turn on a busy machine
TIMEOUT = 300.0  # the groups': nobody ends by it here, unless a test asks for less

Scenario = Callable[[Layout], None]


@dataclass(frozen=True)
class Ended:
    """Exit statuses and last lines of stderr of both ranks."""

    statuses: list[int]
    lines: list[str]


def start_ranks(folder: Path, scenario: Scenario, timeout: float = TIMEOUT) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        _context.Process(target=run_rank, args=(scenario, rank, url, folder / f"stderr_{rank}", timeout))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def watch_ranks(folder: Path, scenario: Scenario, timeout: float = TIMEOUT, *, seconds: float = 100) -> Ended:
    """Run `scenario` on two watched ranks; a rank that has not ended after `seconds` is killed."""
    processes = start_ranks(folder, scenario, timeout)
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    texts = [(folder / f"stderr_{rank}").read_text() for rank in range(2)]
    return Ended([process.exitcode for process in processes], [(text.splitlines() or [""])[-1] for text in texts])


def run_rank(scenario: Scenario, rank: int, url: str, errors: Path, timeout: float) -> None:
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    place = {"rank": rank, "device": torch.device("cpu"), "timeout": timedelta(seconds=timeout)}

    @command
    def main(_: object) -> None:
        rendezvous.connect(url, world_size=2, **place)
        layout = make_layout(replicas=2, **place)
        with watchdog.watch(layout, host="127.0.0.1", silence=SILENCE, timeout=timeout, advice="; resume"):
            layout.activity.begin("step", step=7)
            layout.barrier()
            scenario(layout)
        rendezvous.disconnect()

    main([])


@dataclass(frozen=True)
class OneEnds:
    """One rank does something while the other sleeps, as one does that waits for a GPU: no exception reaches it."""

    action: Callable[[], None]
    victim: int

    def __call__(self, layout: Layout) -> None:
        if layout.rank == self.victim:
            time.sleep(1.5)  # until its first beats have been heard
            with layout.activity.doing("forward", micro_batch=3, stage=1):
                time.sleep(1.5)
                self.action()
        time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def make_a_mistake() -> None:
    raise UserError("data.jsonl:3 is no object")


def have_a_defect() -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_other(tmp_path, victim):
    ended = watch_ranks(tmp_path, OneEnds(die, victim))
    assert ended.statuses[1 - victim] == 75
    place = f"rank {victim} on {HOST} (replica {victim} of 2)"
    why = "it was killed (likely out of memory), or it crashed"
    assert ended.lines[1 - victim] == f"error: {place} died in step 7 (forward, stage 1, micro-batch 3): {why}; resume"


def silence_line(victim: int) -> str:
    return (
        f"error: rank {victim} on {HOST} (replica {victim} of 2) gave no sign of life for 4 s after step 7 (forward, "
        "stage 1, micro-batch 3): it is frozen, or its network is down; resume"
    )


def last_line(folder: Path, rank: int) -> str:
    return (folder / f"stderr_{rank}").read_text().splitlines()[-1]


def test_a_frozen_rank_0_ends_the_others(tmp_path):
    processes = start_ranks(tmp_path, OneEnds(freeze, 0))
    processes[1].join(100)
    status = processes[1].exitcode
    processes[0].kill()
    processes[0].join()
    assert (status, last_line(tmp_path, 1)) == (75, silence_line(0))


def test_a_frozen_rank_ends_the_others_and_itself_when_it_wakes_up(tmp_path):
    processes = start_ranks(tmp_path, OneEnds(freeze, 1))
    processes[0].join(100)
    os.kill(processes[1].pid, signal.SIGCONT)
    processes[1].join(100)
    assert [process.exitcode for process in processes] == [75, 75]
    assert [last_line(tmp_path, rank) for rank in range(2)] == [silence_line(1)] * 2


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_mistake_that_one_rank_finds_ends_all_with_2_and_its_message(tmp_path, victim):
    ended = watch_ranks(tmp_path, OneEnds(make_a_mistake, victim))
    assert ended.statuses == [2, 2]
    assert ended.lines[victim] == "error: data.jsonl:3 is no object"
    assert ended.lines[1 - victim] == (
        f"error: rank {victim} on {HOST} (replica {victim} of 2): data.jsonl:3 is no object"
    )


def test_a_defect_of_one_rank_ends_all_with_1_and_is_named(tmp_path):
    ended = watch_ranks(tmp_path, OneEnds(have_a_defect, 1))
    assert ended.statuses == [1, 1]
    assert ended.lines == [
        f"error: rank 1 on {HOST} (replica 1 of 2): failed (ValueError: boom)",
        "ValueError: boom",
    ]


def wait_for_a_late_rank(layout: Layout) -> None:
    if layout.rank == 1:
        with layout.activity.doing("reading rows"):
            time.sleep(600)
    try:
        layout.barrier()
    except RuntimeError as error:
        raise watchdog.LostPeer("lost a peer", reason="Timed out", timed_out=True) from error


def test_a_rank_that_is_late_is_named_to_those_who_waited_in_vain(tmp_path):
    ended = watch_ranks(tmp_path, wait_for_a_late_rank, timeout=3)
    assert ended.statuses == [75, 75]
    assert ended.lines[0] == ended.lines[1]
    late = f"error: others waited too long (Timed out) for rank 1 on {HOST} (replica 1 of 2), for "
    assert ended.lines[0].startswith(late)
    assert ended.lines[0].endswith(" s in step 7 (reading rows); resume")


def end_well(layout: Layout) -> None:
    time.sleep(2.0 * layout.rank)


def test_ranks_that_are_done_do_not_end_those_that_are_not(tmp_path):
    ended = watch_ranks(tmp_path, end_well)
    assert (ended.statuses, ended.lines) == ([0, 0], ["", ""])


def test_strangers_are_not_heard():
    lie = b'{"failed": "I lie", "status": 2}\n'

    async def talk(words: bytes) -> list[bytes]:
        """Return the server's answers."""
        listener = network.listen("127.0.0.1", 0)
        server = BeatServer(listener, ["rank 0", "rank 1"], "password", SILENCE, 1.0)
        await server.open()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(words)
        writer.write_eof()
        answers = (await asyncio.wait_for(reader.read(), 60)).splitlines()
        writer.close()
        return answers

    for hello in (b"", b"{}\n", b'{"rank": 1, "token": "guess"}\n', b'{"rank": 7, "token": "password"}\n', b"\xff\n"):
        assert asyncio.run(talk(hello + lie)) == []
    assert asyncio.run(talk(b'{"rank": 1, "token": "password"}\n' + lie))[0] == b'{"noted": true}'


def work_hard(layout: Layout) -> None:
    """Python code that never rests, and native code that does not let go of the interpreter for a while."""
    data, end = b"x" * 2000, time.monotonic() + 3 * SILENCE
    while layout.rank == 1 and time.monotonic() < end:
        json.dumps(list(range(10_000)))
        hashlib.sha256(data)


@pytest.mark.long
def test_honest_work_longer_than_the_silence_allowed_is_left_alone(tmp_path):
    assert watch_ranks(tmp_path, work_hard).statuses == [0, 0]


def test_a_timeout_shorter_than_a_step_gets_a_warning():
    assert watchdog.describe_short_timeout(60, 59.9) is None
    assert watchdog.describe_short_timeout(5, 7.25) == (
        "--timeout 5: a step took 7.2 s, so a rank that waits for a slow one may give it up; give at least 22"
    )


PENDING = """
import sys, time, torch, torch.distributed as dist
from datetime import timedelta
from openchatkit.cli import command
from openchatkit.distributed import rendezvous
from openchatkit.errors import UserError

@command
def main(_):
    rank = int(sys.argv[1])
    rendezvous.connect(sys.argv[2], rank=rank, world_size=2, device=torch.device("cpu"), timeout=timedelta(seconds=600))
    dist.all_reduce(torch.ones(1))
    if rank:
        time.sleep(600)
    work = dist.all_reduce(torch.ones(1), async_op=True)
    time.sleep(1)
    rendezvous.abandon(2)
    raise UserError("wrong")

main([])
"""


@pytest.mark.long  # two interpreters that import torch
def test_a_rank_that_fails_while_a_sum_is_under_way_ends(tmp_path):
    """Without `abandon` it waits for the other rank, even after sys.exit, until the timeout of the group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    other, failing = (
        subprocess.Popen([sys.executable, "-c", PENDING, str(rank), url], stderr=subprocess.PIPE, text=True)
        for rank in (1, 0)
    )
    try:
        _, errors = failing.communicate(timeout=120)
    finally:
        for process in (other, failing):
            process.kill()
            process.wait()
    assert (failing.returncode, errors.splitlines()[-1]) == (2, "error: wrong")
