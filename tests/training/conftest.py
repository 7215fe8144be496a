"""Small prepared models and conversations to train on, made once a session."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_shards
import torch
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.convert.from_hf import prepare
from openchatkit.models.registry import config_from_hf
from openchatkit.models.stage import Stage

SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64, max_position_embeddings=64)),
    "tied": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True)
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=400, n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4)
    ),
}
# Of the kit's own family: norms of one number, stacked matrices and biases, grouped heads.
OPTIONS = SIZES | {
    "model_type": "neox",
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "norm": "scalenorm",
    "hidden_act": "geglu",
    "num_kv_heads": 2,
    "gpt_j_tied": True,
}
# And with layers that share relative biases, and drop out.
DROPOUT = OPTIONS | {
    "pos_emb": "rpe",
    "rpe_num_buckets": 8,
    "rpe_max_distance": 24,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.2,
    "norm": "layernorm",
    "gpt_j_tied": False,
    "use_parallel_residual": False,
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Path]:
    """Layer shards, with a tokenizer, of a small random model of each kind."""
    folder = tmp_path_factory.mktemp("prepared")
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        source = folder / "hf" / name
        make().save_pretrained(source)
        shutil.copytree(tiny_tokenizer, source, dirs_exist_ok=True)
        found[name] = prepare(str(source), folder)
    for name, raw in {"options": OPTIONS, "dropout": DROPOUT}.items():
        found[name] = folder / name
        stage = Stage(config_from_hf(raw))
        stage.init_weights(0)
        shards = {shard: dict(module.state_dict()) for shard, module in stage.named_shards()}
        shutil.copytree(tiny_tokenizer, folder / f"{name}_source")
        tiny_shards.write_prepared(found[name], raw, made=shards)
    return found


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of very different lengths, so that micro-batches and replicas have unequal numbers of tokens."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        f"<human>: What does {'it ' * (i % 5)}say?\n<bot>: The answer is {'7 ' * (i * i % 11)}{i}.\n" for i in range(64)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def flags(prepared: dict[str, Path], chats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Flags of a short run: 8 rows a step, some of them nearly all padding."""
    return {
        "model_name": prepared["neox"],
        "task_name": chats,
        "data_cache": tmp_path_factory.mktemp("cache"),
        "seq_length": 48,
        "packing": "none",
        "loss_on": "responses",
        "batch_size": 8,
        "micro_batch_size": 2,
        "total_steps": 1,
        "lr": 1e-3,
    }


@pytest.fixture
def mount_small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a disk of so many bytes and returns its folder; the test is skipped where none may be."""
    folder = tmp_path / "disk"

    def mount(size: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)
