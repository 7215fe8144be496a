"""`training/saving.py`: what is saved beside the steps is what was true at its step, whole or not there."""

import contextlib
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
from loguru import logger
from test_layouts import assert_same_bits, run

from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, ledger, manifest
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.loading import hardware
from openchatkit.models.stage import Stage
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.saving import Saver
from openchatkit.training.weights import Weights


@pytest.fixture
def weights(prepared) -> Weights:
    """The weights of a small model in one process, with optimizer state."""
    shards = LayerShards.open(prepared["neox"])
    stage = Stage(shards.config)
    for shard in stage.shards:
        stage.load(shard, {name: tensor.clone() for name, tensor in shards.read(shard).items()})
    made = Weights(LocalStages({0: stage}), Layout(0, torch.device("cpu")), dtype=torch.float32)
    made.optimizer = torch.optim.AdamW(made.masters.values(), lr=1e-3, fused=True)
    take_step(made)
    return made


def take_step(weights: Weights) -> None:
    for number, master in enumerate(weights.masters.values()):
        master.grad = torch.full_like(master, 0.1 * (number + 1))
    weights.optimizer.step()


@pytest.fixture
def make(prepared, weights):
    """Make a saver of a folder; `published` of what it returns is the list of the steps that got their names."""

    def make(root: Path, *, in_background: bool = True, on_full_disk: str = "stop") -> Saver:
        steps: list[int] = []
        saver = Saver(
            root,
            weights,
            raw_config=LayerShards.open(prepared["neox"]).raw_config,
            tokenizer_from=prepared["neox"],
            in_background=in_background,
            on_full_disk=on_full_disk,
            published=steps.append,
        )
        saver.published = steps
        return saver

    return make


@pytest.fixture
def hold(monkeypatch):
    """An event without which no thread writes a file."""
    event, write = threading.Event(), checkpoint.write_weights

    def wait_and_write(*arguments):
        assert threading.current_thread() is threading.main_thread() or event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_weights", wait_and_write)
    yield event
    event.set()


@pytest.fixture
def warnings():
    """The warnings that are logged."""
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    yield said
    logger.remove(sink)


def hashes(path: Path) -> dict[str, str]:
    return {record.name: record.sha256 for record in manifest.read(path).files.values()}


def test_a_save_holds_the_weights_of_its_step_and_shows_nothing_before_it_is_finished(tmp_path, make, weights, hold):
    blocking, saver = make(tmp_path / "blocking", in_background=False), make(tmp_path / "background")
    for step in (1, 2):
        blocking.save(step, {"step": step})
        hold.clear()
        saver.save(step, {"step": step})
        assert saver.is_writing
        take_step(weights)
        assert saver.published == list(range(1, step))
        assert checkpoint.list_steps(tmp_path / "background") == list(range(1, step))
        hold.set()
        saver.finish()
        assert saver.published == blocking.published == list(range(1, step + 1))
        path = checkpoint.latest(tmp_path / "background")
        checkpoint.verify(path)
        assert path.name == f"checkpoint_{step}"
        assert hashes(path) == hashes(tmp_path / "blocking" / path.name)
    assert hashes(path) != hashes(path.parent / "checkpoint_1")
    saver.finish()  # nothing is left to finish
    assert saver.published == [1, 2]


def test_the_last_save_is_waited_for(tmp_path, make):
    saver = make(tmp_path)
    saver.save(1, {}, last=True)
    assert not saver.is_writing
    assert saver.published == [1]


def test_copies_use_the_same_memory_again(tmp_path, make):
    saver = make(tmp_path)
    places = []
    for step in (1, 2):
        saver.save(step, {})
        saver.finish()
        places.append({place: tensor.data_ptr() for place, tensor in saver._copies._kept.items()})
    assert places[0] == places[1]


def test_without_room_for_copies_steps_wait_for_the_files(tmp_path, make, monkeypatch, warnings):
    make(tmp_path / "roomy").save(1, {}, last=True)
    saver = make(tmp_path / "tight")
    monkeypatch.setattr(hardware, "available_memory", lambda: 1000)
    saver.save(1, {})
    assert not saver._copies._kept
    saver.finish()
    assert hashes(tmp_path / "tight" / "checkpoint_1") == hashes(tmp_path / "roomy" / "checkpoint_1")
    assert warnings == ["steps waited for the files of 6 shards, for whose copies main memory has no room"]


def test_a_saver_that_is_closed_leaves_no_checkpoint_and_no_thread(tmp_path, make, hold):
    saver = make(tmp_path)
    saver.save(1, {}, last=True)
    saver.save(2, {})
    threading.Timer(0.01, hold.set).start()
    saver.close()
    assert not saver.is_writing
    assert (tmp_path / ".checkpoint_2.tmp").is_dir()
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint_1"
    saver = make(tmp_path)
    saver.save(3, {}, last=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1", "checkpoint_3", "latest"]


def test_the_loss_of_a_rank_during_the_copy_is_the_error_that_ends_the_run(tmp_path, make, weights, monkeypatch):
    def lose(_):
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr(weights, "gather", lose)
    with pytest.raises(RuntimeError, match="closed by peer"), contextlib.closing(make(tmp_path)) as saver:
        saver.save(1, {})


def test_a_file_that_the_disk_does_not_take_is_an_error_of_the_main_thread(tmp_path, make, hold):
    """Here since its folder is gone, as by another's hand."""
    saver = make(tmp_path)
    saver.save(1, {}, last=True)
    hold.clear()
    saver.save(2, {})
    checkpoint.discard(tmp_path / ".checkpoint_2.tmp")
    (tmp_path / ".checkpoint_2.tmp").write_text("a file in its place")
    hold.set()
    with pytest.raises(UserError, match=r"cannot write .*checkpoint_2.tmp.*: part of the path is a file"):
        saver.finish()
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint_1"


def test_a_defect_in_the_thread_is_not_swallowed(tmp_path, make, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    saver = make(tmp_path)
    monkeypatch.setattr(checkpoint, "write_optimizer", fail)
    saver.save(1, {})
    with pytest.raises(ZeroDivisionError):
        saver.finish()
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint_and_ends_the_run(tmp_path, make, mount_small_disk, in_background):
    disk, size = make_room_for(1.75, tmp_path, make, mount_small_disk)
    saver = make(disk / "run", in_background=in_background)
    saver.save(1, {}, last=True)
    with pytest.raises(UserError, match="are needed and"):
        saver.save(2, {})
    (disk / "filler").write_bytes(bytes(size // 3))
    saver = make(disk / "run", in_background=in_background)  # which has not seen how large a checkpoint is
    with pytest.raises(UserError, match="the disk is full: make room, then run the same command again"):
        save_and_finish(saver, 2)
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["checkpoint_1", "latest"]
    checkpoint.verify(disk / "run" / "checkpoint_1")


@pytest.mark.parametrize("in_background", [True, False])
def test_a_run_may_go_on_without_the_saves_that_find_no_room(tmp_path, make, mount_small_disk, warnings, in_background):
    disk, size = make_room_for(2.5, tmp_path, make, mount_small_disk)
    (disk / "filler").write_bytes(bytes(size + size // 4))
    saver = make(disk / "run", in_background=in_background, on_full_disk="continue")
    save_and_finish(saver, 1)
    for step in (2, 3):
        save_and_finish(saver, step)
    assert saver.published == [1]
    expected = [f"the run goes on, and step {step} is not saved" for step in (2, 3)]
    assert [warning.split("; ")[-1] for warning in warnings] == expected
    with pytest.raises(UserError, match="are needed and"):
        saver.save(4, {}, last=True)
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["checkpoint_1", "latest"]
    (disk / "filler").unlink()
    saver.save(5, {}, last=True)
    assert saver.published == [1, 5]


def test_a_disk_that_becomes_read_only_is_one_line_and_leaves_the_old_checkpoint(tmp_path, make, mount_small_disk):
    disk, _ = make_room_for(4, tmp_path, make, mount_small_disk)
    saver = make(disk / "run")
    saver.save(1, {}, last=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"cannot write .*/run: the disk is read-only: choose another folder"):
        saver.save(2, {})
    with pytest.raises(UserError, match="the disk is read-only: choose another folder"):
        checkpoint.lock_run(disk / "new")  # as each run does first
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["checkpoint_1", "latest"]
    checkpoint.verify(disk / "run" / "checkpoint_1")


def save_and_finish(saver: Saver, step: int) -> None:
    saver.save(step, {})
    saver.finish()


def make_room_for(checkpoints: float, tmp_path, make, mount_small_disk) -> tuple[Path, int]:
    """Mount a disk for so many checkpoints; returns it and the bytes of one."""
    make(tmp_path / "elsewhere").save(1, {}, last=True)
    size = sum(path.stat().st_size + 4096 for path in (tmp_path / "elsewhere" / "checkpoint_1").iterdir())
    return mount_small_disk(int(size * checkpoints)), size


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_during_its_saves_loses_none_and_ends_in_the_same_bits(tmp_path, flags):
    """Both ranks are killed at 12 moments after a save has begun: in copies, files, publications and deletions."""
    flags = {**flags, "data_group_size": 2, "batch_size": 4, "dp_mode": "sharded", "total_steps": 50}
    golden = run(tmp_path / "golden", flags)
    root, moments = tmp_path / "killed" / "ckpt", random.Random(7)
    again = {**flags, "checkpoint_steps": 1, "keep_checkpoints": 1, "checkpoint_path": root}
    newest = 0
    for number in range(12):
        started = time.time()
        processes = ranks.start(tmp_path / str(number), again, world_size=2)
        limit, goal = time.monotonic() + 120, newest + moments.randrange(3)
        while processes[0].is_alive() and not (read_step(root) >= goal and is_saving(root, since=started)):
            assert time.monotonic() < limit, "no save began"
        time.sleep(moments.uniform(0, 0.1))
        for process in processes:
            process.kill()
        ranks.finish(tmp_path / str(number), processes)
        for step in checkpoint.list_steps(root):
            checkpoint.verify(checkpoint.checkpoint_path(root, step))
        checkpoint.latest(root)  # which stops a run whose `latest` names none
        assert read_step(root) >= newest, "a checkpoint that had its name is gone"
        newest = read_step(root)
    assert 0 < newest < 50
    ended = ranks.finish(tmp_path / "whole", ranks.start(tmp_path / "whole", again, world_size=2), seconds=900)
    assert ended.statuses == [0, 0], ended.errors
    assert_same_bits(golden, root / "checkpoint_50")
    entries = ledger.read(root)
    assert [entry.step for entry in entries] == list(range(1, 51))
    assert checkpoint.read_state(root / "checkpoint_50")["ledger"] == ledger.chain(entries)


def read_step(root: Path) -> int:
    """Return the step that a run would go on from."""
    named = checkpoint.read_latest(root)
    return 0 if named is None else checkpoint.parse_step(named.name)


def is_saving(root: Path, *, since: float) -> bool:
    """Whether a save is under way that was begun after a moment, in seconds of `time.time()`."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime > since for path in root.glob(".checkpoint_*.tmp"))
    return False
