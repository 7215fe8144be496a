"""A run that is killed 50 times, in layouts that change, loses nothing and ends in the bits of one that was not."""

import contextlib
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
from test_layouts import assert_same_bits, run
from test_saving import read_step

from openchatkit.formats import checkpoint, ledger, metrics
from openchatkit.tools.inspection import verification
from openchatkit.training.step import Trainer

# A run may take so many steps beyond its newest checkpoint, so that there is something to kill 50 times. It is saved
# after every second: the first of these saves has its name when the second begins.
REACH = 4
KILLS, STEPS = 50, 120

# All give the same bits: see `test_resume.py`.
LAYOUTS = [
    {},
    {"pipeline_group_size": 2, "pp_mode": "gpipe"},
    {"pipeline_group_size": 2, "pp_mode": "1f1b"},
    {"pipeline_group_size": 2, "pp_mode": "interleaved"},
    {"pipeline_group_size": 4, "pp_mode": "1f1b"},
    {"pipeline_group_size": 4, "pp_mode": "gpipe"},
]


@dataclass(frozen=True)
class Hold:
    """Let a rank take no step beyond the one that a file names, and take its time to write a checkpoint."""

    until: Path

    def __call__(self) -> None:
        step, write = Trainer.step, checkpoint.write_optimizer

        def wait_and_step(trainer: Trainer, number: int, *args: object, **options: object) -> object:
            while number >= int(self.until.read_text()):
                time.sleep(0.01)
            return step(trainer, number, *args, **options)

        def write_slowly(*args: object) -> object:
            time.sleep(0.02)
            return write(*args)

        Trainer.step, checkpoint.write_optimizer = wait_and_step, write_slowly


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_50_times_in_changing_layouts_ends_in_the_bits_of_one_that_was_not(tmp_path, flags):
    flags = {**flags, "total_steps": STEPS, "timeout": 30}
    golden = run(tmp_path / "golden", flags)
    root, until, chance = tmp_path / "killed" / "ckpt", tmp_path / "until", random.Random(11)
    flags |= {"checkpoint_steps": 2, "keep_checkpoints": 2, "checkpoint_path": root}
    inside_saves, victims = 0, set()
    for number in range(KILLS):
        newest, change = read_step(root), chance.choice(LAYOUTS)
        until.write_text(str(newest + REACH))
        size = change.get("pipeline_group_size", 1)
        started = time.time()
        folder = tmp_path / str(number)
        processes = ranks.start(folder, {**flags, **change}, world_size=size, before_main=Hold(until))
        victim = chance.randrange(size)
        have_met = wait_for_moment(chance, root, newest, processes, started=started)
        processes[victim].kill()
        if not have_met:  # as the launcher does: the others would wait for this one as long as --timeout says
            for process in processes:
                process.kill()
        ended = ranks.finish(folder, processes, seconds=45)
        others = [status for rank, status in enumerate(ended.statuses) if rank != victim]
        assert all(status == (75 if have_met else -9) for status in others), (number, change, ended)
        victims.add((size, victim))
        inside_saves += any(root.glob(".checkpoint_*.tmp"))
        for step in checkpoint.list_steps(root):
            checkpoint.verify(checkpoint.checkpoint_path(root, step))
        checkpoint.latest(root)  # which raises where `latest` names none
        assert newest <= read_step(root) <= newest + REACH, "a checkpoint that had its name is gone"
    print(f"{KILLS} kills, {inside_saves} inside saves, of {sorted(victims)}, up to step {read_step(root)}")
    assert inside_saves >= 5
    assert read_step(root) >= 10
    until.write_text(str(STEPS))
    folder = tmp_path / "whole"
    ended = ranks.finish(folder, ranks.start(folder, {**flags, **LAYOUTS[3]}, world_size=2), seconds=900)
    assert ended.statuses == [0, 0], ended.errors
    path = checkpoint.latest(root)
    assert_same_bits(golden, path)
    rows = ledger.read(root)
    assert [row.step for row in rows] == [row["step"] for row in metrics.read(root)] == list(range(1, STEPS + 1))
    assert checkpoint.read_state(path)["ledger"] == ledger.chain(rows)
    proof = verification.verify(root)
    assert (proof.steps, proof.samples, proof.later) == (STEPS, STEPS * 8, 0)


def let_clock_jump() -> None:
    """Let the time of day jump by a day, back or forward, whenever it is read."""
    now, jumps = time.time, itertools.cycle((86_400, -86_400, 3 * 86_400))
    time.time = lambda: now() + next(jumps)
    time.time_ns = lambda: int(time.time() * 1e9)


@pytest.mark.long
def test_a_clock_that_jumps_disturbs_no_run(tmp_path, flags):
    """`tests/test_clocks.py` shows that nothing reads it to decide."""
    flags = {**flags, "pipeline_group_size": 2, "total_steps": 6, "checkpoint_steps": 2, "heartbeat_timeout": 10}
    golden = run(tmp_path / "golden", flags)
    root = tmp_path / "ckpt"
    ended = ranks.train(tmp_path, {**flags, "checkpoint_path": root}, world_size=2, before_main=let_clock_jump)
    assert ended.statuses == [0, 0], ended.errors
    assert_same_bits(golden, checkpoint.latest(root))
    assert verification.verify(root).steps == 6


def wait_for_moment(chance: random.Random, root: Path, newest: int, processes: list, *, started: float) -> bool:
    """Wait for a moment to kill a rank at: in the start, in a step or in a save; returns whether ranks have met."""

    def steps() -> int:
        """Return the last step of this start, which cuts the rows of steps that were lost before it adds its own."""
        with contextlib.suppress(ValueError, FileNotFoundError):  # a line that is being written
            if (root / metrics.METRICS).stat().st_mtime > started:
                return max((row["step"] for row in metrics.read(root)), default=0)
        return 0

    when = chance.choice(["start", "step", "step", "save", "save"])
    if when == "start":
        time.sleep(chance.uniform(0, 2))
        return steps() > newest
    goal = newest + (chance.randint(1, REACH) if when == "step" else chance.choice([2, 4]))
    saving, limit = checkpoint.temporary_path(root, goal), time.monotonic() + 120

    def is_reached() -> bool:
        if when == "step":
            return steps() >= goal
        with contextlib.suppress(FileNotFoundError):  # one that the start before has left
            return saving.stat().st_mtime > started
        return False

    while not is_reached():
        assert time.monotonic() < limit, [process.exitcode for process in processes]
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.2 if when == "step" else 0.02))
    return True
