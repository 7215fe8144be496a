"""The way of data by the commands of docs/data.md: three sources, two kills, another layout, and the proof."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openchatkit.formats import checkpoint_folders, ledger, metrics
from openchatkit.formats.chat import Turn, render_text
from openchatkit.paths import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
# All blocks of commands under a heading, each without its indent.
BLOCKS = {
    section.partition("\n")[0]: [
        re.sub(r"(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^(?:    .*|)\n)*^    .*\n", section)
    ]
    for section in PAGE.split("\n## ")[1:]
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """A folder like a checkout in which the quickstart has been: its chats and its model, only smaller."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from openchatkit.convert.from_hf import prepare

    folder = tmp_path_factory.mktemp("checkout")
    torch.manual_seed(0)
    size = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**size, intermediate_size=64, max_position_embeddings=256))
    model.save_pretrained(folder / "Quickstart")
    shutil.copytree(tiny_tokenizer, folder / "Quickstart", dirs_exist_ok=True)
    prepare(str(folder / "Quickstart"), folder / "pretrained" / "Quickstart")
    chats = (
        render_text([Turn("human", f"What is {n}?" + " on" * (n % 90)), Turn("bot", f"It is {n}.")])
        for n in range(6000)
    )
    data = folder / "data" / "python-docs" / "files"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    return folder


def start(place: Path, python: Path | str, commands: str) -> subprocess.Popen:
    """A shell that runs commands as the page has them, in that folder; the scripts are the checkout's."""
    commands = re.sub(r"(?<![\w/])(tools|training)/", lambda match: f"{ROOT}/{match[0]}", commands)
    commands = commands.replace("--total-steps 200 --checkpoint-steps 20", "--total-steps 120 --checkpoint-steps 12")
    environment = {"PATH": f"{Path(python).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = re.sub(r"(--use-cuda false|inspect_data\.py(?= --task))", r"\1 --data-cache cache", commands)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting_point = f"--dist-url tcp://127.0.0.1:{probe.getsockname()[1]}"
    commands = commands.replace("--use-cuda false", f"--use-cuda false {meeting_point}")
    return subprocess.Popen(
        ["bash", "-ec", commands],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


@pytest.fixture
def run(quick_python):
    """Run commands to their end and return what they print."""

    def run_in(place: Path, commands: str) -> str:
        process = start(place, quick_python, commands)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        return out

    return run_in


def test_three_sources_two_kills_another_layout(place, run):
    make, train, verify = BLOCKS["Three sources, two kills, another layout"]
    *variable, stages, replicas = train.rstrip("\n").rsplit("\n", 2)
    run(place, make)
    folder = place / "example" / "run"
    for enough, saved in ((16, 12), (50, 48)):
        process = start(place, sys.executable, "\n".join([*variable, f"exec {stages}"]))
        limit = time.monotonic() + 120
        # A checkpoint is saved beside the steps that follow it.
        while (
            not any(row["step"] >= enough for row in metrics.read(folder))
            or max(checkpoint_folders.list_steps(folder), default=0) < saved
        ):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run(place, "\n".join([*variable, replicas]))
    proof = run(place, verify)
    assert "verified: 120 steps, 960 samples, each trained exactly once, by 3 runs" in proof
    assert len({entry.layout for entry in ledger.read(folder)}) == 2
    rows = metrics.read(folder)
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert set(rows[-1]["sources"]) == {
        "example/plain.jsonl",
        "example/packed.jsonl.zst",
        "example/messages.parquet",
    }


def test_stores_of_gpt_neox(place, run):
    (commands,) = BLOCKS["GPT-NeoX's stores"]
    run(place, commands)
    assert [row["step"] for row in metrics.read(place / "example" / "neox")] == list(range(1, 21))
    assert "verified: 20 steps, 160 samples" in run(
        place, "python tools/inspect_data.py --verify --checkpoint-path example/neox"
    )


def test_looking_at_data(place, run):
    (command,) = BLOCKS["Looking at it"]
    assert "<bot>:" in run(place, command)
    assert "<bot>" in (place / "example" / "data.html").read_text(encoding="utf-8").replace("&lt;bot&gt;", "<bot>")
