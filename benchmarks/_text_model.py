"""A model that starts at random, a tokenizer of bytes and text to train on, for benchmarks of whole training runs."""

import argparse
import json
import os
import sys
from pathlib import Path


def add_size_flags(
    parser: argparse.ArgumentParser, *, layers: int, width: int, vocabulary: int, seq_length: int
) -> None:
    """Add the flags of a model's sizes, with these defaults."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--seq-length", type=int, default=seq_length)


def write_model(folder: Path, sizes: argparse.Namespace) -> None:
    """Write config.json, tokenizer and text.jsonl to a new folder, for a model of the sizes that the flags say."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = {
        "model_type": "gpt_neox",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 8,
        "max_position_embeddings": sizes.seq_length,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [json.dumps({"text": f"{number} is followed by {number + 1}. " * 20}) for number in range(200)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def training_command(folder: Path, out: Path, sizes: argparse.Namespace, *, ranks: int) -> list[str]:
    """Return the command that trains such a model from random weights on CPUs, without layout and number of steps."""
    command = [sys.executable, "training/launch.py", "--world-size", str(ranks), "training/dist_clm_train.py"]
    command += ["--model-name", str(folder), "--load-pretrained-model", "false", "--use-cuda", "false"]
    command += ["--task-name", str(folder / "text.jsonl"), "--data-cache", str(folder / "cache")]
    return [*command, "--checkpoint-path", str(out), "--seq-length", str(sizes.seq_length)]


def one_thread() -> dict[str, str]:
    """Return the environment of runs whose ranks have one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
