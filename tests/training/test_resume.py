"""checkpoints.py: a run that is killed, stopped or moved to another layout ends with the same bits."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import ranks
import torch
from loguru import logger
from test_layouts import assert_same_bits, run, tensors

from openchatkit.data.options import DataSettings
from openchatkit.formats import checkpoint, metrics
from openchatkit.settings import fields, flag, to_json
from openchatkit.training import checkpoints, config
from openchatkit.training.config import OptimizationSettings
from openchatkit.training.learning_rates import LearningRateSettings
from openchatkit.training.loop import stop_requests

STAGES = {"pipeline_group_size": 2, "pp_mode": "1f1b"}
REPLICAS = {"data_group_size": 2, "batch_size": 4}
LONG = {"total_steps": 60, "checkpoint_steps": 7}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, flags):
    """Sixty steps over two stages without a break."""
    return run(tmp_path_factory.mktemp("unstopped"), flags, **LONG, **STAGES)


def interrupted(folder: Path, flags: dict, sign: int, victims: list[int], *, after: int = 16) -> ranks.Ended:
    """Start the long run over two stages and send some of its ranks a signal when a step is done."""
    flags = {**flags, **LONG, **STAGES, "checkpoint_path": folder / "ckpt"}
    processes = ranks.start(folder, flags, world_size=2)
    limit = time.monotonic() + 60
    while not any(row["step"] >= after for row in metrics.read(folder / "ckpt")):
        assert time.monotonic() < limit, "the run did not reach that step within a minute"
        time.sleep(0.002)
    for victim in victims:
        os.kill(processes[victim].pid, sign)
    return ranks.finish(folder, processes)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_killed_and_resumed_gives_the_same_bits(tmp_path, flags, unstopped, victim):
    ended = interrupted(tmp_path, flags, signal.SIGKILL, [victim])
    assert ended.statuses[victim] == -signal.SIGKILL
    assert ended.statuses[1 - victim] == 75, ended.errors
    [line] = [line for line in ended.errors[1 - victim].splitlines() if line.startswith("error: ")]
    # What was heard of it last: ranks that are fast take their first steps before their second sign of life.
    assert re.search(
        rf"rank {victim} on {re.escape(socket.gethostname())} \(pipeline rank {victim} of 2\) died in ", line
    )
    assert "the same command resumes" in line
    # The save of step 14 may still have been under way.
    assert checkpoint.latest(tmp_path / "ckpt").name in [f"checkpoint_{step}" for step in (7, 14, 21, 28)]
    again = run(tmp_path, flags, **LONG, **STAGES)
    assert_same_bits(unstopped, again)
    assert [row["step"] for row in metrics.read(again.parent)] == list(range(1, 61))


def test_no_rank_waits_longer_for_a_frozen_one_than_the_timeout(tmp_path, flags):
    """Over stages and replicas both, whose groups are not the one that all ranks share."""
    change = {"pipeline_group_size": 2, "data_group_size": 2, "batch_size": 4, "total_steps": 100000, "timeout": 8}
    processes = ranks.start(tmp_path, {**flags, **change, "checkpoint_path": tmp_path / "ckpt"}, world_size=4)
    limit = time.monotonic() + 60
    while not metrics.read(tmp_path / "ckpt"):
        assert time.monotonic() < limit, "no step was done within a minute"
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)
    others, limit = [processes[rank] for rank in (0, 2, 3)], time.monotonic() + 60
    for process in others:
        process.join(max(0.1, limit - time.monotonic()))
    statuses = [process.exitcode for process in others]
    errors = ranks.finish(tmp_path, processes, seconds=0).errors
    assert statuses == [75, 75, 75], errors
    name = f"rank 1 on {socket.gethostname()} (pipeline rank 1 of 2, replica 0 of 2)"
    frozen = f"{name} gave no sign of life for 8 s after"
    assert all(frozen in errors[rank] for rank in (0, 2, 3)), errors


@pytest.mark.parametrize(
    ("sign", "victims"),
    [
        pytest.param(signal.SIGTERM, [1], marks=pytest.mark.long),
        (signal.SIGINT, [0, 1]),
        pytest.param(signal.SIGTERM, [0], marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, [0, 1], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_all_ranks_save_the_same_step_when_asked_to_stop(tmp_path, flags, unstopped, sign, victims):
    ended = interrupted(tmp_path, flags, sign, victims)
    assert ended.statuses == [75, 75], ended.errors
    step = int(checkpoint.latest(tmp_path / "ckpt").name.removeprefix("checkpoint_"))
    assert 16 <= step < 60
    assert f"stopped after step {step} of 60" in ended.errors[0]
    assert_same_bits(unstopped, run(tmp_path, flags, **LONG, **STAGES))


def test_a_signal_that_arrives_twice_at_once_counts_once():
    """A signal to all processes of a job reaches each rank a second time, through the launcher."""
    with stop_requests() as requests:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # without the rule, this ends the test's own process
    assert requests


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pipeline_group_size": 4, "pp_mode": "gpipe"},
        {"batch_size": 4, "gradient_accumulate_step": 2},
        {"pp_mode": "interleaved"},
        pytest.param({"pp_mode": "zero-bubble-v", "activation_checkpointing": "false"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_resumed_on_other_stages_gives_the_same_bits(tmp_path, flags, unstopped, change):
    folder = tmp_path / "ckpt"
    shutil.copytree(older(unstopped, 56), folder / "checkpoint_56")
    (folder / "latest").write_text("56\n")
    assert_same_bits(unstopped, run(tmp_path, flags, **LONG, **change))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({**STAGES, **REPLICAS}, marks=pytest.mark.long),
        {**STAGES, **REPLICAS, "dp_mode": "sharded"},
        {"tensor_group_size": 2},
        pytest.param({"tensor_group_size": 2, **STAGES, "pp_mode": "interleaved"}, marks=pytest.mark.long),
        pytest.param({"tensor_group_size": 2, **REPLICAS, "dp_mode": "sharded"}, marks=pytest.mark.long),
        pytest.param({"tensor_group_size": 2, **STAGES, **REPLICAS, "dp_mode": "sharded"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_resumed_on_other_replicas_and_parts_is_equal_to_a_millionth(tmp_path, flags, unstopped, change):
    folder = tmp_path / "ckpt"
    shutil.copytree(older(unstopped, 56), folder / "checkpoint_56")
    (folder / "latest").write_text("56\n")
    assert_weights_near(unstopped, run(tmp_path, flags, **LONG, **change))


def assert_weights_near(one: Path, other: Path) -> None:
    expected, found = tensors(one), tensors(other)
    for name in expected:
        if "/step" not in name and "exp_avg" not in name:
            assert (expected[name] - found[name]).abs().max() <= 1e-6, name
    assert expected.keys() == found.keys()


@pytest.mark.parametrize(
    "change",
    [
        {**REPLICAS, "dp_mode": "sharded", "optimizer": "8bit-adam"},
        pytest.param({**REPLICAS, "dp_mode": "sharded", "bf16": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_shared_state_resumes_to_the_bits_of_plain_replicas(tmp_path, flags, change):
    """And on again: from runs of each replica to whole parameters, and from those to runs."""
    whole = run(tmp_path / "whole", flags, total_steps=6, checkpoint_steps=2, keep_checkpoints=3, **change)
    plain = {**change, "dp_mode": "allreduce"}
    for name, first, then in (("to_plain", 2, plain), ("to_shared", 4, {**change, **STAGES, "pp_mode": "gpipe"})):
        folder = tmp_path / name / "ckpt"
        shutil.copytree(older(whole, first), folder / f"checkpoint_{first}")
        (folder / "latest").write_text(f"{first}\n")
        assert_same_bits(whole, run(tmp_path / name, flags, total_steps=6, **then))


def test_a_run_in_parts_is_resumed_by_one_process(tmp_path, flags):
    change = {"total_steps": 6, "lr": 1e-4}
    parts = {"tensor_group_size": 2, **STAGES, "checkpoint_steps": 3}
    whole = run(tmp_path / "whole", flags, **change, **parts)
    folder = tmp_path / "part" / "ckpt"
    shutil.copytree(older(whole, 3), folder / "checkpoint_3")
    (folder / "latest").write_text("3\n")
    assert_weights_near(whole, run(tmp_path / "part", flags, **change))


def older(newest: Path, step: int) -> Path:
    """The checkpoint of an earlier step, which a run keeps beside its last."""
    path = newest.parent / f"checkpoint_{step}"
    assert path.is_dir(), list(newest.parent.iterdir())
    return path


def test_only_the_newest_checkpoints_are_kept(unstopped, tmp_path, flags):
    assert sorted(p.name for p in unstopped.parent.glob("*checkpoint*")) == ["checkpoint_56", "checkpoint_60"]
    path = run(tmp_path, flags, total_steps=6, checkpoint_steps=2, keep_checkpoints=3)
    assert sorted(p.name for p in path.parent.glob("checkpoint_*")) == ["checkpoint_2", "checkpoint_4", "checkpoint_6"]


def test_a_finished_run_has_nothing_to_do(tmp_path, flags):
    path = run(tmp_path, flags, total_steps=2)
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    assert run(tmp_path, flags, total_steps=2) == path
    assert before == {p: p.stat().st_mtime_ns for p in path.iterdir()}


@pytest.mark.parametrize(
    "change", [{"fp16": True, "initial_loss_scale": 64, "loss_scale_window": 2}, {"optimizer": "8bit-adam"}], ids=str
)
def test_other_state_resumes_to_the_same_bits(tmp_path, flags, change):
    whole = run(tmp_path / "whole", flags, total_steps=6, checkpoint_steps=3, **change)
    folder = tmp_path / "part" / "ckpt"
    shutil.copytree(older(whole, 3), folder / "checkpoint_3")
    (folder / "latest").write_text("3\n")
    part = run(tmp_path / "part", flags, total_steps=6, **STAGES, **change)
    assert_same_bits(whole, part)
    rows = [{row["step"]: row["loss_scale"] for row in metrics.read(path.parent)} for path in (whole, part)]
    assert all(rows[0][step] == rows[1][step] for step in (4, 5, 6))


def test_every_setting_that_a_resume_changes_is_named():
    """By the fields of the settings, so that none is forgotten; in the tests of soundness, by runs."""
    was = config.parse(["--model-name", "m", "--task-name", "d", "--total-steps", "5"])
    changes = {"loss_scale": 8.0, "precision": "bfloat16", "min_lr": 1e-6, "lr_decay_steps": 4}
    for field in fields(DataSettings) + fields(LearningRateSettings) + fields(OptimizationSettings):
        old, choices = getattr(was, field.name), field.metadata["choices"]
        if isinstance(old, (int, float)) and not isinstance(old, bool):
            changes.setdefault(field.name, old / 2 if isinstance(old, float) else old + 1)
        elif choices:
            changes.setdefault(field.name, next(choice for choice in choices if choice != old))
    without_effect = {
        "initial_loss_scale": changes.pop("initial_loss_scale"),
        "data_cache": Path("x"),
        "bf16": True,
        "use_offload": True,
    }
    state = {"settings": to_json(was), "total_steps": 5, "precision": "float32"}
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    # What Adam has none of, and what fits no other setting of data.
    apart = {"momentum": 0.5, "sm3_beta": 0.25, "data_order": "neox"}
    changes = {name: value for name, value in changes.items() if name not in apart}
    now = dataclasses.replace(was, **changes, **without_effect)
    checkpoints.warn_of_changes(state, now, path=Path("checkpoint_2"), total_steps=7, dtype="bfloat16")
    other = dataclasses.replace(was, optimizer="sm3")
    state["settings"] = to_json(other)
    now = dataclasses.replace(other, **apart)
    checkpoints.warn_of_changes(state, now, path=Path("checkpoint_2"), total_steps=5, dtype="float32")
    logger.remove(sink)
    expected = {"total_steps": (5, 7), **{name: (getattr(was, name), new) for name, new in changes.items()}}
    expected |= {"lr_decay_steps": ("not given", 4), **{name: (getattr(was, name), new) for name, new in apart.items()}}
    assert {
        "lr",
        "warmup_steps",
        "lr_decay_style",
        "optimizer",
        "adam_beta1",
        "weight_decay",
        "precision",
        "seed",
    } < set(expected)
    assert sorted(said) == sorted(
        f"{flag(name)} was {old} up to checkpoint_2 and is {new} from here on" for name, (old, new) in expected.items()
    )


def test_a_resume_in_another_precision_says_so(tmp_path, flags):
    path = run(tmp_path, flags, total_steps=1)
    ended = ranks.train(tmp_path, {**flags, "checkpoint_path": path.parent, "total_steps": 2, "bf16": True})
    assert ended.statuses == [0], ended.errors
    assert "--precision was float32 up to checkpoint_1 and is bfloat16 from here on" in ended.errors[0]
    assert checkpoint.read_state(path.parent / "checkpoint_2")["precision"] == "bfloat16"


def test_an_altered_checkpoint_is_not_resumed(tmp_path, flags):
    path = run(tmp_path, flags, total_steps=4, checkpoint_steps=2)
    expected = {name: tensor.clone() for name, tensor in tensors(path).items()}
    victim = path / "layer_00002.optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    ended = ranks.train(tmp_path, {**flags, "total_steps": 6, "checkpoint_path": path.parent, **STAGES}, world_size=2)
    assert 2 in ended.statuses
    message = next(error for error, status in zip(ended.errors, ended.statuses, strict=True) if status == 2)
    assert "layer_00002.optimizer.safetensors was altered" in message
    assert "checkpoint_2" in message
    (path.parent / "latest").write_text("2\n")
    resumed = tensors(run(tmp_path, flags, total_steps=4, checkpoint_steps=2))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
