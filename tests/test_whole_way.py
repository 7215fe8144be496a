"""The whole way by the README's own commands, at toy scale: prepare, train by a recipe, resume, convert, chat."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess

import pytest

from openchatkit.formats import metrics
from openchatkit.paths import ROOT

SMALL = "--embedding-dim 32 --seq-length 32 --lr 1e-3 --use-cuda false"


@pytest.fixture
def place(tmp_path, tiny_tokenizer):
    """A folder with a base model of 16 layers and some chats."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 16, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**size, intermediate_size=64, max_position_embeddings=256))
    model.save_pretrained(tmp_path / "EleutherAI" / "tiny")
    shutil.copytree(tiny_tokenizer, tmp_path / "EleutherAI" / "tiny", dirs_exist_ok=True)
    chats = ({"text": f"<human>: What is {n}?\n<bot>: It is {n}.\n"} for n in range(100))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return tmp_path


@pytest.fixture
def shell(place, quick_python):
    """Run a command line as the READMEs have it, in that folder; the scripts are the checkout's."""

    def run(line: str, *, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        line = re.sub(r"\b(tools|training|inference)/", lambda match: shlex.quote(str(ROOT)) + "/" + match[0], line)
        path = f"{quick_python.parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", line],
            cwd=place,
            input=stdin,
            capture_output=True,
            text=True,
            # Recipes take the Python of this environment, whichever else there are.
            env={**os.environ, "PATH": path, "OPENCHATKIT_VENV": str(quick_python.parents[1]), **environment},
        )
        assert result.returncode == 0, result.stderr
        return result

    return run


def finetune(recipe: str, flags: str) -> str:
    model = "--model-name pretrained/EleutherAI_tiny --tokenizer-name pretrained/EleutherAI_tiny --data-cache cache"
    return f"bash training/finetune_{recipe}.sh {model} {SMALL} {flags}"


def test_from_a_base_model_to_a_chat(place, shell):
    shell("python tools/convert_from_hf_gptneox.py --model-name EleutherAI/tiny --save-dir pretrained")
    environment = {"FINETUNE_DATA": "chats.jsonl:1", "FINETUNE_CHECKPOINT_PATH": "model_ckpts/tiny"}
    train = finetune("Pythia-1.4B", "--num-layers 16 --batch-size 4 --micro-batch-size 2 --checkpoint-steps 2")
    shell(train, **environment, FINETUNE_TOTAL_STEPS="3")
    shell(train, **environment, FINETUNE_TOTAL_STEPS="5")
    assert [row["step"] for row in metrics.read(place / "model_ckpts" / "tiny")] == [1, 2, 3, 4, 5]
    shell(
        "python tools/convert_to_hf_gptneox.py --ckpt-path model_ckpts/tiny --save-path huggingface_models/tiny --fp16"
    )
    chat = shell("python inference/bot.py --model huggingface_models/tiny --max-tokens 4", stdin="Hello\n")
    assert chat.stdout


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("Pythia-Chat-Base-7B", "--num-layers 2 --batch-size 8"),
        ("GPT-NeoXT-Chat-Base-20B", "--num-layers 4 --batch-size 8"),
    ],
)
@pytest.mark.long
def test_recipes_of_eight_ranks(place, shell, recipe, flags):
    """Eight CPU processes in place of eight GPUs; the same command, told to go further, goes on."""
    shell("python tools/convert_from_hf_gptneox.py --model-name EleutherAI/tiny --save-dir pretrained")
    environment = {"FINETUNE_DATA": "chats.jsonl:1", "FINETUNE_CHECKPOINT_PATH": "ckpt"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = finetune(recipe, f"{flags} --dist-url tcp://127.0.0.1:{port}")
    assert "step 2/2" in shell(command, **environment, FINETUNE_TOTAL_STEPS="2").stderr
    last = shell(command, **environment, FINETUNE_TOTAL_STEPS="4")
    assert "resuming from ckpt/checkpoint_2" in last.stderr
    assert [row["step"] for row in metrics.read(place / "ckpt")] == [1, 2, 3, 4]
