"""Models with random weights, the tiny tokenizer in their folders, and runs with their weights."""

import shutil
from pathlib import Path

import torch

from openchatkit.formats import checkpoint
from openchatkit.loading import model_kinds, stages

SMALL = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 0}


def write_random_models(root: Path, tokenizer: Path) -> dict[str, Path]:
    """Write a GPT-NeoX and a GPT-J with random weights below `root`; return their folders by name."""
    from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    neox = GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.3,
        **SMALL,
    )
    gptj = GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=8, initializer_range=0.3, **SMALL)
    for name, kind, config in (("neox", GPTNeoXForCausalLM, neox), ("gptj", GPTJForCausalLM, gptj)):
        torch.manual_seed(1)
        kind(config).save_pretrained(root / name)
        add_tokenizer(tokenizer, root / name)
    return {name: root / name for name in ("neox", "gptj")}


def add_tokenizer(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        shutil.copy(file, folder)


def write_run(folder: Path, model: Path, *steps: int, tokenizer: bool = True) -> Path:
    """Write a run's folder, with checkpoints of a model's weights after some steps; return it."""
    reader = stages.open_shards(model_kinds.find(model))
    for step in steps:
        temporary = checkpoint.begin(folder, step)
        records = [checkpoint.write_weights(temporary, shard, reader.read(shard)) for shard in reader.shards]
        checkpoint.finish(
            temporary,
            folder,
            step,
            state={"layout": {}},
            records=records,
            raw_config=reader.raw_config,
            tokenizer_from=model if tokenizer else None,
        )
    return folder
