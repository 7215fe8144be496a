"""`deepy.py`: runs of real ranks on the processor, what it passes on to other hosts, and what it refuses."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from neox_cases import SHIPPED, in_yaml, write_task

from openchatkit.formats import checkpoint
from openchatkit.neox.hosts import Host
from openchatkit.neox.remote import HostCommand, start_command
from openchatkit.paths import ROOT

DEEPY = str(ROOT / "neox" / "deepy.py")
# What makes a shipped configuration small enough for a test: two stages of two layers.
SHRUNKEN = {
    "pipe_parallel_size": 2,
    "model_parallel_size": 1,
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "train_iters": 3,
    "lr_decay_iters": 3,
    "eval_interval": 2,
    "eval_iters": 1,
    "zero_optimization": {"stage": 0},
    "attention_config": None,
}


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to connections."""
    while True:
        port = random.randint(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def deepy(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEEPY, *arguments, "--master_port", str(free_port())],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def prepare(folder: Path, name: str = "configs2021/small.yml", **settings: object) -> None:
    """A corpus where its host is gone, its store, and the two configuration files of GPT-NeoX's first example."""
    place = folder / "data" / "enron"
    place.mkdir(parents=True)
    words = ["the", "a", "mail", "from", "to", "of", "enron", "energy", "market", "power"]
    texts = [" ".join(words[(i * j) % 10] for j in range(1, 40)) for i in range(200)]
    (place / "mails.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepared = subprocess.run(
        [sys.executable, str(ROOT / "neox" / "prepare_data.py"), "enron", "-t", "CharLevelTokenizer", "-d", "./data/"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert prepared.returncode == 0, prepared.stderr
    (folder / "configs").mkdir()
    model = {key: value for key, value in SHIPPED[name].items() if not key.endswith("_data_paths")}
    model = {key: value for key, value in model.items() if key not in ("tokenizer_type", "vocab_file")}
    (folder / "configs" / "small.yml").write_text(in_yaml(model | SHRUNKEN | settings), encoding="utf-8")
    local = SHIPPED["configs2021/local_setup.yml"]
    (folder / "configs" / "local_setup.yml").write_text(in_yaml(local), encoding="utf-8")


def read_state(folder: Path) -> dict[str, object]:
    return checkpoint.read_state(folder / "checkpoints" / "checkpoint_3")


def read_losses(*folders: Path) -> list[str]:
    """The first row of the metrics in each folder."""
    return [(folder / "metrics.jsonl").read_text().splitlines()[0] for folder in folders]


def test_the_first_two_commands(tmp_path):
    prepare(tmp_path)
    done = deepy(tmp_path, "pretrain_gpt2.py", "-d", "configs", "small.yml", "local_setup.yml")
    assert done.returncode == 0, done.stderr
    state = read_state(tmp_path)
    assert (state["step"], state["global_batch"], state["layout"]["stages"]) == (3, 4, 2)
    losses = [json.loads(line) for line in (tmp_path / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "evaluation_loss" in row] == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "configs").iterdir()) == [
        "local_setup.yml",
        "small.yml",
    ]
    assert done.stderr.count("without effect here: ") == 1  # said by one rank
    assert "tokenizer_type is not given: it is CharLevelTokenizer, which made the data" in done.stderr


# Shrunken, the others of their age are one of these.
@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["configs2021/XL.yml", *(f"configs/pythia/{size}.yml" for size in ("14M", "1B", "410M"))]
)
def test_configurations_of_2021_and_pythia_train_on_two_stages(tmp_path, name):
    prepare(tmp_path, name)
    done = deepy(tmp_path, "train.py", "-d", "configs", "small", "local_setup")
    assert done.returncode == 0, done.stderr
    assert read_state(tmp_path)["step"] == 3


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pos_emb", ["learned", "rpe", "alibi"])
def test_other_positions_dropout_and_sparse_layers_train_on_two_stages(tmp_path, pos_emb):
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    prepare(tmp_path, pos_emb=pos_emb, sparsity="interspersed", no_weight_tying=False, **dropout)
    done = deepy(tmp_path, "train.py", "-d", "configs", "small", "local_setup")
    assert done.returncode == 0, done.stderr
    assert read_state(tmp_path)["step"] == 3
    done = deepy(tmp_path, "generate.py", "-d", "configs", "small", "local_setup", "--maximum_tokens", "20")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.txt").read_text()


def train_with_a_task(folder: Path, **settings: object) -> tuple[list[str], dict[int, dict[str, float]]]:
    """Train as the README says, with a task; returns the files' arguments, and its metrics by step."""
    prepare(folder, save_interval=1, eval_tasks=["own_choice"], eval_include_paths=["tasks"], **settings)
    write_task(folder / "tasks")
    files = ["-d", "configs", "small.yml", "local_setup.yml"]
    done = deepy(folder, "pretrain_gpt2.py", *files)
    assert done.returncode == 0, done.stderr
    assert "own_choice_acc" in done.stderr
    rows = [json.loads(line) for line in (folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    return files, {row["step"]: row["eval"] for row in rows if "eval" in row}


def evaluate_task(folder: Path, files: list[str], step: int) -> dict[str, float]:
    """The metrics of the task with the checkpoint of a step, as `train_with_a_task` has them."""
    done = deepy(folder, "eval.py", *files, "--iteration", str(step), "--eval_results_prefix", f"at_{step}")
    assert done.returncode == 0, done.stderr
    [written] = folder.glob(f"at_{step}_eval_results_*.json")
    found = json.loads(written.read_text())["results"]["own_choice"]
    return {f"own_choice_{name}": found[f"{name},none"] for name in ("acc", "acc_norm")}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_generation_and_evaluation_follow_the_first_two_commands(tmp_path):
    pytest.importorskip("lm_eval")
    files, in_training = train_with_a_task(tmp_path)
    assert list(in_training) == [2, 3]
    for step, metrics in in_training.items():
        assert metrics == evaluate_task(tmp_path, files, step)
    shutil.copy(ROOT / "neox" / "configs" / "text_generation.yml", tmp_path / "configs")
    done = deepy(tmp_path, "generate.py", *files, "text_generation.yml")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "sample_output.txt").read_text().splitlines()]
    assert len(lines) == 10
    assert {line["context"] for line in lines} == {""}
    assert 0 < max(line["length"] for line in lines) <= 64
    (tmp_path / "prompts").write_text("the mail\n")
    done = deepy(tmp_path, "text_gen_gpt2.py", *files, "-i", "prompts", "-o", "out", "--maximum_tokens", "8")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["length"] for line in (tmp_path / "out").read_text().splitlines()] == [8]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", [{"model_parallel_size": 2}, {"num_gpus": 2}], ids=("parts", "replicas"))
def test_tasks_have_one_result_in_any_layout(tmp_path, layout):
    pytest.importorskip("lm_eval")
    files, in_training = train_with_a_task(tmp_path, pipe_parallel_size=1, **layout)
    assert in_training[3] == evaluate_task(tmp_path, files, 3)


@pytest.mark.long
def test_a_run_goes_on_in_another_layout(tmp_path):
    prepare(tmp_path)
    command = ["train.py", "-d", "configs", "small", "local_setup"]
    first = deepy(tmp_path, *command, "--train_iters", "2")
    assert first.returncode == 0, first.stderr
    layout = ["--pipe-parallel-size", "1", "--model-parallel-size", "2", "--zero_optimization", "{stage: 0}"]
    then = deepy(tmp_path, *command, *layout)
    assert then.returncode == 0, then.stderr
    assert "resuming from checkpoints/checkpoint_2" in then.stderr
    assert (read_state(tmp_path)["step"], read_state(tmp_path)["layout"]["tensor"]) == (3, 2)
    tuned = deepy(tmp_path, *command, *layout[:2], "--finetune", "true", "--save", "tuned")
    assert tuned.returncode == 0, tuned.stderr
    before, after = (json.loads(line) for line in read_losses(tmp_path / "checkpoints", tmp_path / "tuned"))
    assert after["step"] == 1
    assert after["loss"] < before["loss"]  # a new run, of weights that have learned


@pytest.fixture
def ssh(tmp_path: Path) -> str:
    """A PATH with an ssh that runs the command here, as the host's name says in a file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = (
        f'#!/bin/sh\n[ "$1 $2" = "-o BatchMode=yes" ] || exit 9\necho "$3" >> {tmp_path}/hosts_used\nexec sh -c "$4"\n'
    )
    (tools / "ssh").write_text(script)
    (tools / "ssh").chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


@pytest.mark.long
def test_ranks_of_two_hosts_meet(tmp_path, ssh):
    prepare(tmp_path)
    (tmp_path / "hosts").write_text("worker-1.invalid slots=1\nworker-2.invalid slots=1\n")
    command = ["train.py", "-d", "configs", "small", "local_setup", "-H", "hosts", "--master_addr", "127.0.0.1"]
    done = deepy(tmp_path, *command, PATH=ssh)
    assert done.returncode == 0, done.stderr
    assert read_state(tmp_path)["step"] == 3
    assert sorted((tmp_path / "hosts_used").read_text().split()) == ["worker-1.invalid", "worker-2.invalid"]


@pytest.mark.long
def test_a_request_to_end_reaches_the_ranks_of_all_hosts(tmp_path, ssh):
    prepare(tmp_path, train_iters=100_000, eval_iters=0)
    (tmp_path / "hosts").write_text("worker-1.invalid slots=1\nworker-2.invalid slots=1\n")
    command = ["train.py", "-d", "configs", "small", "local_setup", "-H", "hosts", "--master_addr", "127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, DEEPY, *command, "--master_port", str(free_port())],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": ssh},
    )
    metrics = tmp_path / "checkpoints" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert list((tmp_path / "checkpoints").glob("checkpoint_*")), errors


@pytest.mark.long
def test_a_host_that_fails_ends_the_run(tmp_path, ssh):
    prepare(tmp_path)
    (tmp_path / "hosts").write_text("worker-1.invalid slots=1\nworker-2.invalid slots=1\n")
    command = ["train.py", "-d", "configs", "small", "local_setup", "-H", "hosts", "--master_addr", "127.0.0.1"]
    done = deepy(
        tmp_path, *command, "--seq_length", "64", "--vocab-file", "x", "--tokenizer_type", "HFTokenizer", PATH=ssh
    )
    assert done.returncode == 2
    assert "error: --tokenizer-type HFTokenizer: there is no x" in done.stderr


def test_a_command_of_a_host_ends_its_streams_while_its_input_is_open(tmp_path):
    command = HostCommand(Host("localhost", (0,)), tmp_path, "sh -c 'echo said >&2; exit 7'")
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            start_command(command, "ssh"), stdin=reading, capture_output=True, timeout=60, check=False
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert (done.returncode, done.stderr) == (7, b"said\n")


def test_nothing_of_deepy_waits_for_torch():
    code = "import sys, openchatkit.neox.deepy; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_commands_of_hosts_are_printed(tmp_path, monkeypatch):
    prepare(tmp_path)
    (tmp_path / "hosts").write_text("worker-1.invalid slots=2\nworker-2.invalid slots=4\n")
    (tmp_path / ".deepspeed_env").write_text("MY_SETTING=a b\n")
    command = ["train.py", "-d", "configs", "small", "local_setup", "-H", "hosts", "--include", "worker-1.invalid@"]
    command[-1] += "worker-2.invalid:1,3"
    given = {"NCCL_DEBUG": "INFO", "HOME": str(tmp_path), "MLFLOW_TRACKING_PASSWORD": "a secret"}
    done = deepy(tmp_path, *command, "--print-commands", **given)
    assert "secret" not in done.stdout
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "checkpoints").exists()
    first, second = done.stdout.splitlines()
    host, _, text = second.partition(": ")
    words = shlex.split(text)
    assert host == "worker-2.invalid"
    assert words[:3] == ["cd", str(tmp_path), "&&"]
    assert {"MY_SETTING=a b", "NCCL_DEBUG=INFO", "CUDA_VISIBLE_DEVICES=1,3"} <= set(words)
    assert " ".join(words).count("--world-size 4 --first-rank 2 --ranks-here 2") == 1
    assert re.search(r"--dist-url=tcp://worker-1.invalid:\d+$", text)
    assert "--first-rank 0 --ranks-here 2" in first
    # One machine's ranks meet at another port where the usual one is taken.
    alone = [sys.executable, DEEPY, "train.py", "-d", "configs", "small", "local_setup", "--print-commands"]
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # then another run has it
            taken.bind(("127.0.0.1", 29500))
        here = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, check=True)
    port = re.search(r"--dist-url=tcp://127.0.0.1:(\d+)$", here.stdout.strip())
    assert port is not None
    assert port[1] != "29500"
    assert "CUDA_VISIBLE_DEVICES" not in here.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate.py", "c.yml"], r"load is not given: name the folder of the checkpoints, as training's save does"),
        (["evaluate.py", "c.yml", "--load", "none"], r"--load none: it is no folder: train first, or name the folder"),
        (["trian.py", "c.yml"], r"there is no script trian.py: expected train.py, pretrain_gpt2.py, generate.py, text"),
        (
            ["train.py", "c.yml", "--num_layres", "2"],
            r"--num_layres: GPT-NeoX has no setting 'num_layres': the nearest is",
        ),
        (["train.py", "c.yml", "--seed"], r"--seed is there without a value: settings are given as --seed VALUE"),
        (["train.py", "c.yml", "--seed", "1", "--seed=2"], r"--seed=2 is there twice: leave one out"),
        (["train.py", "c.yml", "--autotuning", "run"], r"--autotuning run: a feature of DeepSpeed that is not here"),
        (["train.py"], r"the following arguments are required: CONF"),
    ],
)
def test_mistakes(write, monkeypatch, capsys, arguments, message):
    from openchatkit.neox import deepy as command

    path = write("c.yml", SHIPPED["configs/125M.yml"] | {"hostfile": None})
    monkeypatch.chdir(path.parent)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
