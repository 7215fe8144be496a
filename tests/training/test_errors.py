"""A user's mistakes: one line that says what was given, what was expected and what to do, and exit status 2."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import ranks
from test_layouts import assert_same_bits, run
from tokenizers import Tokenizer

from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.settings import fields
from openchatkit.training import config


def refused(folder: Path, flags: dict, *, world_size: int = 1, **change: object) -> str:
    """Run with a mistake; returns the one line of the rank that found it, or of rank 0 if all did."""
    flags = {"checkpoint_path": folder / "ckpt", **flags, **change}
    ended = ranks.train(folder, flags, world_size=world_size)
    assert 2 in ended.statuses, ended.errors
    lines = ended.errors[ended.statuses.index(2)].splitlines()
    messages = [line for line in lines if line.startswith("error: ")]
    assert len(messages) == 1, lines
    assert not any("Traceback" in error for error in ended.errors)
    assert not list((folder / "ckpt").glob("checkpoint_*")) or "resume" in str(change)
    return messages[0]


SHORT = ["--total-steps", "1"]
PIPELINE = ["--pipeline-group-size", "2"]
BASE = ["--model-name", "m", "--task-name", "d.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --model-name, --task-name"),
        (["--total-steps", "0"], "--total-steps: expected a whole number of at least 1, got '0'"),
        (["--total-steps", "x"], "got 'x'"),
        (["--lr", "nan", "--total-steps", "1"], "--lr: expected a number of at least 0"),
        (["--use-cuda", "maybe"], "expected true or false, got 'maybe'"),
        (["--total-steps", "1", "--world-size", "3"], "--world-size 3 is not --pipeline-group-size 1 x"),
        (["--total-steps", "1", "--rank", "1"], "--rank 1: ranks of --world-size 1 are 0 to 0"),
        (["--total-steps", "1", "--batch-size", "9", "--micro-batch-size", "2"], "--batch-size 9 is not a multiple"),
        (
            ["--total-steps", "1", "--pipeline-group-size", "8", "--pp-mode", "1f1b", "--batch-size", "8"],
            "--pp-mode 1f1b needs at least as many micro-batches as ranks in a pipeline",
        ),
        (
            [*SHORT, *PIPELINE, "--pp-mode", "interleaved", "--batch-size", "7", "--micro-batch-size", "1"],
            "--batch-size 7 / --micro-batch-size 1 = 7 is no multiple of 3; make it 6 or 8, or use --pp-mode 1f1b",
        ),
        ([*SHORT, *PIPELINE, "--pp-mode", "zero-bubble"], "give --activation-checkpointing none, or --pp-mode inter"),
        (
            [*SHORT, *PIPELINE, "--pp-mode", "zero-bubble-v", "--stages-per-rank", "3"],
            "--stages-per-rank 3: --pp-mode zero-bubble-v has 2 on each rank; leave the flag out, or give --pp-mode "
            "with one of interleaved, zero-bubble",
        ),
        ([*SHORT, "--pp-mode", "interleaved", "--stages-per-rank", "2"], "--stages-per-rank 2: one rank has the whole"),
        ([*SHORT, "--balance", "best"], "--balance: invalid choice: 'best'"),
        (["--total-steps", "1", "--dist-url", "127.0.0.1:7033"], "expected tcp://HOST:PORT"),
        (["--total-steps", "1", "--dist-url", "tcp://h:99999"], "expected tcp://HOST:PORT"),
        (["--total-steps", "1", "--dp-mode", "local"], "--dp-mode: invalid choice: 'local'"),
        ([], "give --total-steps N or --nepochs N"),
        (["--total-steps", "1", "--fp16", "--bf16"], "--fp16 and --bf16 exclude each other"),
        (["--total-steps", "1", "--fp16", "--precision", "auto"], "--fp16 and --precision auto exclude each other"),
        (["--total-steps", "1", "--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
        (["--total-steps", "1", "--evaluation-steps", "5"], "--evaluation-steps and --evaluation-data go together"),
        (["--total-steps", "1", "--aws-secret-access-key", "x"], "--aws-secret-access-key: a command line and"),
        (
            [*SHORT, "--tensor-group-size", "3", "--sequence-parallel", "--seq-length", "2048"],
            "--seq-length 2048 is not a multiple of --tensor-group-size 3: make it one",
        ),
        ([*SHORT, *PIPELINE, "--pp-mode", "zero-bubble", "--compile"], "leave one of them out"),
        ([*SHORT, "--checkpoint-upload-prefix", "bucket/x"], "prefix: expected s3://BUCKET/PREFIX, got 'bucket/x'"),
        ([*SHORT, "--aws-endpoint-url", "x"], "--aws-endpoint-url: set AWS_ENDPOINT_URL in the environment"),
        ([*SHORT, "--use-offload", "disk"], "--use-offload: expected true or false, got 'disk'"),
        ([*SHORT, "--activation-checkpointing", "some"], "expected none, full or selective, got 'some'"),
        (
            [*SHORT, "--tensor-group-size", "2", "--optimizer", "8bit-adam"],
            "exclude each other: blocks of it that hold columns",
        ),
        (
            [*SHORT, "--tensor-group-size", "2", "--optimizer", "sm3"],
            "--optimizer sm3 and --tensor-group-size 2 exclude each other",
        ),
        (
            [*SHORT, "--data-group-size", "2", "--dp-mode", "sharded", "--optimizer", "sm3"],
            "--optimizer sm3 and --dp-mode sharded exclude each other: it keeps maxima of whole rows",
        ),
        ([*SHORT, "--optimizer", "lion", "--optimizer-state", "bf16"], "lion keeps its state in float32: leave"),
        ([*SHORT, "--optimizer", "madgrad", "--adam-eps", "0"], "madgrad divides by --adam-eps where a gradient"),
        (
            [*SHORT, "--optimizer", "8bit-adam", "--log-norms", "gradients,optimizer-state"],
            "--log-norms optimizer-state: state of 8 bits has no norms",
        ),
        ([*SHORT, "--log-norms", "weights"], "--log-norms: expected one or several of gradients, parameters, opt"),
        ([*SHORT, "--momentum", "0.9"], "--momentum 0.9 is of --optimizer madgrad or sm3, not of adamw: leave it out"),
        ([*SHORT, "--optimizer", "lion", "--sm3-beta", "0.9"], "--sm3-beta 0.9 is of --optimizer sm3, not of lion"),
        ([*SHORT, "--tensor-group-size", "2", "--world-size", "1"], "x --tensor-group-size 2 = 2: make them agree"),
        (["--pp-mode", "zigzag"], "--pp-mode: invalid choice: 'zigzag'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--config", "/nowhere.yml"], "--config /nowhere.yml: No such file or directory: expected a YAML file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags(argv, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        config.parse(argv if "required" in message else BASE + argv)


def test_torchrun_numbers_ranks_where_no_flag_does(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    flags = [*BASE, "--total-steps", "1", "--pipeline-group-size", "4", "--pp-mode", "gpipe"]
    settings = config.parse(flags)
    assert (settings.rank, settings.world_size, settings.cuda_id, settings.dist_url) == (3, 4, 1, None)
    with pytest.raises(UserError, match="--world-size 8, but torchrun started 4 ranks"):
        config.parse([*flags, "--world-size", "8"])


def test_torchrun_and_the_launcher_win_over_a_file_that_numbers_a_process(tmp_path, monkeypatch):
    """A file is read by every process: `rank: 0` in it, as a checkpoint's settings have, would make all the first."""
    path = tmp_path / "run.yml"
    path.write_text("rank: 0\ncuda_id: 0\nworld_size: 2\npipeline_group_size: 2\ntotal_steps: 1\n", encoding="utf-8")
    settings = config.parse([*BASE, "--config", str(path), "--rank", "1", "--cuda-id", "1", "--world-size", "2"])
    assert (settings.rank, settings.cuda_id) == (1, 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    settings = config.parse([*BASE, "--config", str(path)])
    assert (settings.rank, settings.world_size, settings.cuda_id, settings.dist_url) == (1, 2, 1, None)


def test_a_file_may_have_what_the_command_line_may(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("total_steps: 3\nnum_heads: 4\nbf16: true\n", encoding="utf-8")
    settings = config.parse([*BASE, "--config", str(path)])
    assert (settings.total_steps, settings.precision, settings.ignored) == (3, "bfloat16", ("num_heads",))
    assert config.parse([*BASE, "--config", str(path), "--precision", "float32"]).bf16 is False
    path.write_text("aws_region: here\n", encoding="utf-8")
    with pytest.raises(UserError, match="--aws-region: set AWS_REGION in the environment"):
        config.parse([*BASE, "--config", str(path)])


def test_a_checkpoint_records_settings_that_make_the_same_run(tmp_path, flags):
    """Settings from a file are recorded as those from flags are, and what is recorded can be read as a file."""
    path = run(tmp_path / "flags", flags, warmup_steps=3)
    recorded = checkpoint.read_state(path)["settings"]
    assert set(recorded) == {field.name for field in fields(config.Settings)}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(recorded), encoding="utf-8")
    launch = {"config": file, "checkpoint_path": tmp_path / "ckpt"}
    assert ranks.train(tmp_path, launch).statuses == [0]
    again = tmp_path / "ckpt" / path.name
    assert_same_bits(path, again)
    differing = {name for name, value in checkpoint.read_state(again)["settings"].items() if value != recorded[name]}
    assert differing <= {"checkpoint_path", "dist_url"}


def test_flags_of_the_original_kit_without_effect_get_a_warning(tmp_path, flags):
    ended = ranks.train(tmp_path, {**flags, "checkpoint_path": tmp_path / "c", "num_heads": 4, "debug_mem": "true"})
    assert ended.statuses == [0]
    assert "--num-heads has no effect: config.json says how many heads there are" in ended.errors[0]
    assert "--debug-mem has no effect" in ended.errors[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 1, "pipeline_group_size": 2}, "--num-layers 1 x 2 stages = 2 layers, the model"),
        ({"embedding_dim": 64}, "--embedding-dim 64: the model's hidden size is 32"),
        ({"model_type": "gptj"}, "--model-type: the flag says gptj, the model's config.json gpt_neox"),
        ({"seq_length": 4096}, "--seq-length 4096: the model was made for at most 64 tokens"),
        ({"net_interface": "nope0"}, "--net-interface nope0: this machine has no such interface; it has lo"),
        ({"model_name": "/nowhere"}, "no such folder"),
        ({"tokenizer_name": "/nowhere"}, "/nowhere is not a folder: expected one that holds a tokenizer"),
        ({"task_name": "/nowhere/x.jsonl"}, "no file /nowhere/x.jsonl"),
    ],
    ids=str,
)
def test_model_data_and_machine(tmp_path, flags, change, message):
    assert message in refused(tmp_path, flags, **change, world_size=change.get("pipeline_group_size", 1))


def test_tokenizer_larger_than_the_vocabulary(tmp_path, flags, tiny_tokenizer):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<new {i}>" for i in range(401 - tokenizer.get_vocab_size())])
    tokenizer.save(str(folder / "tokenizer.json"))
    message = refused(tmp_path, flags, tokenizer_name=folder)
    assert "the tokenizer has 401 tokens, the model's embedding 400" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n[1]\n', "bad.jsonl:2: "),
        ('{"text": 7}\n', "bad.jsonl:1: "),
        ("", "bad.jsonl"),
        ('{"text": "nobody answers"}\n', "<bot>:"),
    ],
)
def test_bad_data(tmp_path, flags, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert message in refused(tmp_path, flags, task_name=path)


def test_port_taken(tmp_path, flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        # Rank 0 alone: torch's client waits without end for an answer from the listener.
        message = refused(tmp_path, {**flags, "world_size": 2}, dist_url=url, pipeline_group_size=2, timeout=3)
    assert "cannot listen on 127.0.0.1" in message
    assert "--dist-url" in message


def test_a_missing_rank(tmp_path, flags):
    message = refused(tmp_path, {**flags, "world_size": 2}, pipeline_group_size=2, timeout=2)
    assert "rank 0 did not meet all of the 2 ranks" in message


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_damaged_shard(tmp_path, flags, damage):
    model = tmp_path / "model"
    shutil.copytree(flags["model_name"], model)
    shard = model / "layer_00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(data[:-8])
    else:
        data[-3] ^= 4
        shard.write_bytes(data)
    message = refused(tmp_path, flags, model_name=model, pipeline_group_size=2, world_size=2)
    assert "layer_00001.safetensors" in message
    assert {"missing": "is missing", "cut": "was cut", "altered": "was altered"}[damage] in message


def test_resume_with_another_global_batch(tmp_path, flags):
    path = run(tmp_path, flags)
    flags = {**flags, "checkpoint_path": path.parent, "total_steps": 2}
    before = sorted(path.parent.rglob("*"))
    ended = ranks.train(tmp_path, {**flags, "data_group_size": 2}, world_size=2)
    assert ended.statuses == [2, 2]
    assert "was trained with 8 rows a step" in ended.errors[0]
    assert "give --batch-size 4" in ended.errors[0]
    ended = ranks.train(tmp_path, {**flags, "batch_size": 2, "gradient_accumulate_step": 3})
    assert "no --batch-size makes that here" in ended.errors[0]
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("before", "now"),
    [({}, {"optimizer": "8bit-adam"}), ({"optimizer_state": "8bit"}, {"optimizer": "adam", "optimizer_state": "bf16"})],
    ids=str,
)
def test_resume_with_moments_in_another_form(tmp_path, flags, before, now):
    path = run(tmp_path, flags, **before)
    ended = ranks.train(tmp_path, {**flags, "checkpoint_path": path.parent, "total_steps": 2, **now})
    assert ended.statuses == [2], ended.errors
    had = f"--optimizer adamw --optimizer-state {before.get('optimizer_state', 'float32')}"
    has = "--optimizer 8bit-adam" if not before else "--optimizer adam --optimizer-state bf16"
    assert f"{path} has the state of {had}, of which none of {has} can be made: give the former" in ended.errors[0]


def test_resume_of_another_model(tmp_path, flags, prepared):
    path = run(tmp_path, flags)
    flags = {**flags, "checkpoint_path": path.parent, "total_steps": 2}
    ended = ranks.train(tmp_path, {**flags, "model_name": prepared["gptj"]})
    assert ended.statuses == [2]
    assert "is a checkpoint of another model than --model-name" in ended.errors[0]
    ended = ranks.train(tmp_path, {**flags, "load_checkpoint": "false"})
    assert ended.statuses == [2]
    assert "which --load-checkpoint false would overwrite" in ended.errors[0]


def test_ranks_with_different_data(tmp_path, flags):
    """As on two machines whose files differ; here it is the seed."""
    flags = {**flags, "checkpoint_path": tmp_path / "ckpt", "pipeline_group_size": 2}
    ended = ranks.train(tmp_path, flags, world_size=2, own={1: {"seed": 7}})
    assert ended.statuses == [2, 2], ended.errors
    assert all("error: rank 1 found other data than rank 0" in error for error in ended.errors)


def test_unusable_data_ends_every_rank(tmp_path, flags):
    """Each rank finds it by itself, before the ranks meet."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": 7}\n')
    ended = ranks.train(
        tmp_path,
        {**flags, "task_name": path, "pipeline_group_size": 2, "checkpoint_path": tmp_path / "c"},
        world_size=2,
    )
    assert ended.statuses == [2, 2], ended.errors
    assert all("bad.jsonl:1: " in error and "Traceback" not in error for error in ended.errors)


def test_two_runs_in_one_folder(tmp_path, flags):
    flags = {**flags, "checkpoint_path": tmp_path / "ckpt"}
    first = ranks.start(tmp_path / "first", {**flags, "total_steps": 100000}, world_size=1)
    while not (tmp_path / "ckpt" / "metrics.jsonl").exists():
        assert first[0].is_alive()
    second = ranks.train(tmp_path / "second", flags)
    first[0].kill()
    ranks.finish(tmp_path / "first", first)
    assert second.statuses == [2]
    assert "is in use by another run" in second.errors[0]


def test_changed_data_gets_a_warning(tmp_path, flags, chats):
    path = run(tmp_path, flags)
    flags = {**flags, "checkpoint_path": path.parent, "total_steps": 2, "seed": 9}
    ended = ranks.train(tmp_path, flags)
    assert ended.statuses == [0]
    assert "the data, its weights or its order differ" in ended.errors[0]


def test_hopeless_gradients_end_the_run(tmp_path, flags):
    message = refused(tmp_path, flags, fp16=True, loss_scale=2.0**60, total_steps=30)
    assert "the gradient was not finite for 20 steps in a row, up to step 20" in message
