"""From labelled texts to a moderated chat, by the recipe and the commands that the documentation names."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
import torch
import yaml
from moderation_rule import labelled_rows
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.inference.moderation.policy import Policy
from openchatkit.paths import ROOT

QUESTION, ANSWER = Policy().messages["question"], Policy().messages["answer"]
SMALL = (
    "--num-layers 2 --embedding-dim 64 --seq-length 128 --batch-size 16 --micro-batch-size 16 --lr 5e-3 "
    "--warmup-steps 10 --use-cuda false --data-cache cache"
)


@pytest.fixture
def shell(tmp_path, quick_python):
    """Run a command line as the documentation has it, in a folder of its own; the scripts are the checkout's."""

    def run(line: str, *, stdin: str = "", **environment: str) -> str:
        line = re.sub(r"\b(tools|training|inference)/", lambda match: shlex.quote(str(ROOT)) + "/" + match[0], line)
        path = f"{quick_python.parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PATH": path,
                "OPENCHATKIT_VENV": str(quick_python.parents[1]),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_from_labelled_texts_to_a_moderated_chat(tmp_path, shell, moderation_tokenizer, trained_model):
    torch.manual_seed(0)
    size = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**size, intermediate_size=128, max_position_embeddings=192))
    model.save_pretrained(tmp_path / "EleutherAI" / "tiny")
    shutil.copytree(moderation_tokenizer, tmp_path / "EleutherAI" / "tiny", dirs_exist_ok=True)
    (tmp_path / "labelled.jsonl").write_bytes(b"\n".join(labelled_rows(512)))

    shell("python tools/convert_from_hf_gptneox.py --model-name EleutherAI/tiny --save-dir pretrained")
    base = "--model-name pretrained/EleutherAI_tiny --tokenizer-name pretrained/EleutherAI_tiny"
    shell(
        f"bash training/finetune_Pythia-Moderation-1.4B.sh {base} {SMALL}",
        FINETUNE_DATA="labelled.jsonl",
        FINETUNE_CHECKPOINT_PATH="model_ckpts/tiny",
        FINETUNE_TOTAL_STEPS="120",
    )
    shell("python tools/convert_to_hf_gptneox.py --ckpt-path model_ckpts/tiny --save-path moderation")
    judged = shell(
        "python inference/moderate.py --moderation-model moderation --json", stdin="cat\nthe bomb\nwe steal\n"
    )
    assert [(row["label"], row["allowed"]) for row in map(json.loads, judged.splitlines())] == [
        ("casual", True),
        ("needs intervention", False),
        ("needs caution", True),
    ]
    (tmp_path / "policy.yaml").write_text("answers: {needs intervention: allow}", encoding="utf-8")
    chat = f"python inference/bot.py --model {trained_model} --no-date --no-sample"
    replies = shell(
        f"{chat} --moderation-model moderation --moderation-policy policy.yaml", stdin="hello\nthe bomb\nhello\n"
    )
    assert replies == f"first\n{QUESTION}\nagain\n"


@pytest.fixture
def policy_file(tmp_path):
    """Write a policy in which every label of a part has an action."""

    def write(**actions: str):
        path = tmp_path / "policy.yaml"
        labels = Policy().questions
        path.write_text(yaml.safe_dump({part: dict.fromkeys(labels, action) for part, action in actions.items()}))
        return path

    return write


def test_a_blocked_answer_is_not_shown(piped, trained_model, moderation_model, policy_file):
    flags = ("--no-date", "--no-sample", "--moderation-model", str(moderation_model), "--moderation-policy")
    done = piped("hello\n", trained_model, *flags, str(policy_file(answers="block")))
    assert done.lines == [ANSWER]
    done = piped("hello\n", trained_model, *flags, str(policy_file(answers="allow", questions="block")))
    assert done.lines == [QUESTION]
    done = piped("hello\n", trained_model, *flags, str(policy_file(answers="allow", questions="warn")))
    assert done.lines == ["first"]
    assert [note for note in done.notes if "moderation: " in note]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--moderation-model", "{random}"),
            r"--moderation-model .* does not judge: its labels together have a probab",
        ),
        (("--moderation-model", "{chat}"), "the moderation model: this model reads 192 tokens at once, of which"),
        (("--moderation-model", "{empty}"), "the moderation model: .* is not a Hugging Face model"),
        (("--moderation-policy", "{empty}"), "--moderation-policy needs --moderation-model, which is not given"),
        (("--moderation-gpu-id", "0"), "--moderation-gpu-id needs --moderation-model"),
        (("--moderation-model", "{chat}", "--moderation-policy", "{empty}"), "cannot be read: Is a directory"),
    ],
)
def test_a_chat_that_cannot_be_moderated_does_not_start(piped, trained_model, random_models, tmp_path, flags, message):
    names = {"{random}": str(random_models["gptj"]), "{chat}": str(trained_model), "{empty}": str(tmp_path)}
    done = piped("hello\n", trained_model, *(names.get(flag, flag) for flag in flags))
    assert (done.status, done.lines) == (2, [])
    assert len(done.notes) == 1
    assert re.search(f"^error: .*{message}", done.notes[0])
