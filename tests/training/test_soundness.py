"""`training/soundness.py`, and the warnings before a run: bad steps replace no good checkpoint, bad input is named."""

import json
import math
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from test_layouts import run, tensors

from openchatkit.convert.from_hf import prepare
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, metrics
from openchatkit.training.setup import RunProgress
from openchatkit.training.soundness import Soundness
from openchatkit.training.step import SourceLoss, StepResult

STAGES = {"pipeline_group_size": 2, "pp_mode": "1f1b"}


def train(folder: Path, flags: dict, *, world_size: int = 1, **change: object) -> ranks.Ended:
    return ranks.train(folder, {**flags, **change, "checkpoint_path": folder / "ckpt"}, world_size=world_size)


@pytest.fixture
def one_nan(tmp_path: Path, prepared: dict[str, Path]) -> Path:
    """A Hugging Face model one of whose weights is NaN."""
    source = tmp_path / "hf" / "broken"
    shutil.copytree(prepared["neox"].parent / "hf" / "neox", source)
    weights = load_file(source / "model.safetensors")
    weights["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"][3, 5] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_a_nan_weight_is_named(tmp_path, flags, one_nan):
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.dense_4h_to_h\.weight holds NaN or infinite numbers"):
        prepare(str(one_nan), tmp_path / "strict")
    model = prepare(str(one_nan), tmp_path, finite=False)
    ended = train(tmp_path, flags, model_name=model, total_steps=3, world_size=2, **STAGES)
    assert ended.statuses == [2, 2]
    assert "mlp.dense_4h_to_h.weight of layer_00002 holds NaN or infinite numbers" in ended.errors[0]
    assert "Traceback" not in "".join(ended.errors)
    assert checkpoint.latest(tmp_path / "ckpt") is None


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.long)])
def test_diverged_weights_replace_no_good_checkpoint(tmp_path, flags, keep):
    change = {"checkpoint_steps": 1, "keep_checkpoints": keep}
    run(tmp_path, flags, total_steps=6, **change)
    good = tensors(checkpoint.latest(tmp_path / "ckpt"))
    ended = train(tmp_path, flags, total_steps=40, lr=1e30, **change)
    assert ended.statuses == [2]
    assert "the same command goes on from" in ended.errors[0]
    assert "--lr was 0.001 up to checkpoint_6 and is 1e+30 from here on" in ended.errors[0]
    latest = checkpoint.latest(tmp_path / "ckpt")
    assert latest.name in ended.errors[0]
    assert latest.name == "checkpoint_6"
    checkpoint.verify(latest)
    assert all(torch.equal(tensor, good[name]) for name, tensor in tensors(latest).items())
    again = run(tmp_path, flags, total_steps=40, **change)
    assert again.name == "checkpoint_40"
    losses = [row["loss"] for row in metrics.read(tmp_path / "ckpt")]
    assert len(losses) == 40
    assert all(loss is not None for loss in losses)


def test_a_last_step_whose_loss_is_nan_is_not_saved(tmp_path, flags):
    run(tmp_path, flags, total_steps=4)
    ended = train(tmp_path, flags, total_steps=10, lr=1e30)
    assert ended.statuses == [2]
    assert "nothing of them is saved" in ended.errors[0]
    assert checkpoint.list_steps(tmp_path / "ckpt") == [4]


def test_the_last_proven_checkpoint_is_kept(tmp_path, flags):
    change = {"checkpoint_steps": 2, "keep_checkpoints": 1}
    run(tmp_path, flags, total_steps=6, **change)
    # Step 5 was taken with the weights of step 4; nothing has been with those of step 6.
    assert checkpoint.list_steps(tmp_path / "ckpt") == [4, 6]
    assert checkpoint.read_state(tmp_path / "ckpt" / "checkpoint_6")["proven"] == 4
    run(tmp_path, flags, total_steps=7, **change)
    assert checkpoint.list_steps(tmp_path / "ckpt") == [6, 7]


def test_a_far_too_high_loss_scale_is_halved_at_every_step(tmp_path, flags):
    ended = train(tmp_path, flags, fp16=True, initial_loss_scale=2**36, total_steps=30)
    assert ended.statuses == [0], ended.errors
    rows = metrics.read(tmp_path / "ckpt")
    applied = [json.loads(line)["applied"] for line in (tmp_path / "ckpt" / "ledger.jsonl").read_text().splitlines()]
    scales = [row["loss_scale"] for row in rows]
    first = applied.index(True)
    assert 5 < first < 25
    # The first overflow changes nothing, each one after it halves the scale.
    assert scales[: first + 1] == [2.0**36, *(2.0 ** (36 - n) for n in range(1, first)), 2.0 ** (36 - first + 1)]


def test_a_run_that_changed_no_weight_fails(tmp_path, flags):
    ended = train(tmp_path, flags, fp16=True, initial_loss_scale=2**100, total_steps=3)
    assert ended.statuses == [2]
    assert "none of the steps 1 to 3 changed a weight" in ended.errors[0]
    assert checkpoint.latest(tmp_path / "ckpt") is None


@pytest.mark.parametrize(("total_steps", "left"), [(6, 4), (40, 2)])
def test_overflowing_gradients_lose_few_steps(tmp_path, flags, total_steps, left):
    """With a finite loss the newest checkpoint is as good as any, until too many steps with it were in vain."""
    change = {"fp16": True, "checkpoint_steps": 2, "keep_checkpoints": 3}
    run(tmp_path, flags, total_steps=4, loss_scale=1024.0, **change)
    assert checkpoint.read_state(tmp_path / "ckpt" / "checkpoint_4")["proven"] == 2
    ended = train(tmp_path, flags, total_steps=total_steps, loss_scale=2.0**100, **change)
    assert ended.statuses == [2]
    assert f"the same command goes on from {checkpoint.checkpoint_path(tmp_path / 'ckpt', left)}" in ended.errors[0]
    assert checkpoint.latest(tmp_path / "ckpt").name == f"checkpoint_{left}"
    assert checkpoint.list_steps(tmp_path / "ckpt") == [2, 4]


@pytest.fixture
def few_replies(tmp_path: Path) -> Path:
    """Eight rows with a reply, and eight without: `Assistant:` opens none."""
    path = tmp_path / "few.jsonl"
    tags = ["<bot>:", "Assistant:"]
    rows = [{"text": f"<human>: What is {n}?\n{tags[n % 2]} It is {n}.\n"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_step_without_a_trained_token_changes_nothing(tmp_path, flags, few_replies):
    change = {"batch_size": 1, "micro_batch_size": 1, "checkpoint_steps": 1, "keep_checkpoints": 30, "total_steps": 12}
    run(tmp_path, flags, task_name=few_replies, weight_decay=0.5, **change)
    rows = metrics.read(tmp_path / "ckpt")
    empty = [row["step"] for row in rows if not row["trained_tokens"]]
    assert 0 < len(empty) < 12
    assert all(row["loss"] is None for row in rows if row["step"] in empty)
    applied = [row["step"] for row in rows if row["trained_tokens"]]
    for step in (step for step in empty if step > applied[0]):
        before, after = (tensors(tmp_path / "ckpt" / f"checkpoint_{n}") for n in (step - 1, step))
        assert all(torch.equal(before[name], after[name]) for name in before), step
    full = applied[1]
    before, after = (tensors(tmp_path / "ckpt" / f"checkpoint_{n}") for n in (full - 1, full))
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_rows_without_a_reply_are_counted_before_the_start(tmp_path, flags, few_replies):
    ended = train(tmp_path, flags, task_name=few_replies)
    assert ended.statuses == [0]
    assert f"{few_replies}: 8 of 16 documents have no reply to train on" in ended.errors[0]
    with few_replies.open("a") as file:
        file.write(json.dumps({"text": "<human>: q\nAssistant: a\n"}) + "\n")
    ended = train(tmp_path / "again", flags, task_name=few_replies)
    assert ended.statuses == [2]
    assert "9 of 17 documents have no reply to train on" in ended.errors[0]
    assert "or pass --max-without-reply 0.53" in ended.errors[0]
    ended = train(tmp_path / "allowed", flags, task_name=few_replies, max_without_reply=0.53)
    assert ended.statuses == [0], ended.errors


def test_a_resume_names_changed_settings(tmp_path, flags):
    run(tmp_path, flags, total_steps=2)
    ended = train(tmp_path, flags, total_steps=4, adam_beta2=0.95, weight_decay=0.1, optimizer="adam", warmup_steps=1)
    assert ended.statuses == [0]
    for line in (
        "--total-steps was 2 up to checkpoint_2 and is 4 from here on",
        "--adam-beta2 was 0.999 up to checkpoint_2 and is 0.95 from here on",
        "--weight-decay was 0.01 up to checkpoint_2 and is 0.1 from here on",
        "--optimizer was adamw up to checkpoint_2 and is adam from here on",
        "--warmup-steps was 0 up to checkpoint_2 and is 1 from here on",
    ):
        assert line in ended.errors[0]
    assert "--lr was" not in ended.errors[0]


def test_settings_without_effect_are_warnings(tmp_path, flags, prepared, tiny_tokenizer):
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    source = tmp_path / "hf" / "model"
    shutil.copytree(prepared["neox"].parent / "hf" / "neox", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_dropout": 0.1}))
    model = prepare(str(source), tmp_path)
    shutil.copytree(tiny_tokenizer, tokenizer)
    text = (tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    merges = json.loads(text)["model"]["merges"]
    changed = json.loads(text)
    changed["model"]["merges"] = merges[:-1]
    (tokenizer / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    ended = train(tmp_path, flags, model_name=model, tokenizer_name=tokenizer, nepochs=3)
    assert ended.statuses == [0], ended.errors
    assert "hidden_dropout 0.1 in config.json has no effect, nothing is dropped out" in ended.errors[0]
    assert f"--tokenizer-name {tokenizer} gives other ids than the tokenizer of {model}" in ended.errors[0]
    assert "--nepochs has no effect: --total-steps 1 is given" in ended.errors[0]


def test_a_folder_that_cannot_be_made_is_one_line_of_every_rank(tmp_path, flags):
    (tmp_path / "file").touch()
    place = {**flags, "checkpoint_path": tmp_path / "file" / "ckpt"}
    ended = ranks.train(tmp_path, {**place, **STAGES}, world_size=2)
    assert ended.statuses == [2, 2]
    for errors in ended.errors:
        assert "cannot write" in errors
        assert "Traceback" not in errors


def test_epochs_are_logged_and_whole(tmp_path, flags):
    """408 rows in two files: each is trained on exactly once, whatever the sizes of the files."""
    for name, count in (("large", 400), ("small", 8)):
        rows = [{"text": f"<human>: What is {n}?\n<bot>: It is {n}.\n"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = f"{tmp_path / 'large.jsonl'},{tmp_path / 'small.jsonl'}"
    ended = train(tmp_path, flags, task_name=names, total_steps=None, nepochs=1, seq_length=16)
    assert ended.statuses == [0], ended.errors
    assert "large.jsonl: 1 epochs in 408 samples of all sources" in ended.errors[0]
    assert "small.jsonl: 1 epochs in 408 samples of all sources" in ended.errors[0]
    assert len(metrics.read(tmp_path / "ckpt")) == 51
    names = f"{tmp_path / 'large.jsonl'}:1,{tmp_path / 'small.jsonl'}:1"
    ended = train(tmp_path / "weighted", flags, task_name=names, total_steps=None, nepochs=1, seq_length=16)
    assert "large.jsonl: 0.51 epochs in 408 samples of all sources" in ended.errors[0]
    assert "small.jsonl: 25.5 epochs in 408 samples of all sources" in ended.errors[0]


def test_a_full_disk_is_one_line_of_every_rank_and_leaves_the_old_checkpoint(tmp_path, flags, mount_small_disk):
    """The disk has room for one checkpoint and a half."""
    root = mount_small_disk(1300 << 10) / "ckpt"
    place = {**flags, **STAGES, "checkpoint_path": root, "total_steps": 9, "checkpoint_steps": 1}
    ended = ranks.train(tmp_path, place, world_size=2)
    assert ended.statuses == [2, 2], ended.errors
    for errors in ended.errors:
        assert ": make room, then run the same command again" in errors
        assert "Traceback" not in errors
    assert not [path for path in root.iterdir() if path.name.endswith(".tmp")]
    assert checkpoint.list_steps(root) == [1]
    checkpoint.verify(checkpoint.latest(root))


def test_a_source_whose_loss_was_never_finite_is_named(tmp_path):
    soundness = Soundness(tmp_path, RunProgress(), Layout(0, torch.device("cpu")), keep=2)
    good, bad, none = SourceLoss(1.0, 4), SourceLoss(math.nan, 4), SourceLoss(0.0, 0)
    rows = [(good, bad, bad), (bad, bad, none), *[(bad, bad, bad)] * 18]
    for sources in rows:
        fields = {"grad_norm": math.nan, "lr": 0.1, "applied": False, "stop": False, "digest": 0}
        result = StepResult(loss=math.nan, trained_tokens=12, sources=sources, **fields)
        soundness.add(result, scale_can_fall=False, sources=["a", "b", "c"])
    with pytest.raises(UserError, match="20 steps in a row, up to step 0, nor the loss of b: lower --lr"):
        soundness.check()


@pytest.mark.parametrize(
    ("options", "last", "message"),
    [
        ({}, 10 + 20, "not finite for 20 steps in a row"),
        ({"max_overflows": 50}, 50, "not finite for 50 steps in a row"),
        ({"max_overflows": 50, "ends_at_min_scale": True}, 10 + 5, "not finite at step 15, with the least loss scale"),
    ],
    ids=str,
)
def test_overflows_end_a_run_by_its_limits(tmp_path, options, last, message):
    """The loss scale falls in the first 10 steps, and is exhausted from the 15th on, say; GPT-NeoX's limit is 50."""
    progress = RunProgress()
    soundness = Soundness(tmp_path, progress, Layout(0, torch.device("cpu")), keep=2, **options)
    fields = {"grad_norm": math.inf, "lr": 0.1, "applied": False, "stop": False, "digest": 0, "trained_tokens": 4}
    for step in range(1, last + 1):
        soundness.check()
        progress.step = step
        result = StepResult(loss=1.0, sources=(SourceLoss(1.0, 4),), scale_is_exhausted=step >= 15, **fields)
        soundness.add(result, scale_can_fall=step <= 10, sources=["a"])
    with pytest.raises(UserError, match=f"the gradient was {message}.*: lower --lr, use --bf16"):
        soundness.check()
