"""A model that starts at random, a tokenizer of bytes and text to train on, for benchmarks of whole training runs."""

import json
from pathlib import Path


def write_model(folder: Path, *, layers: int, width: int, vocabulary: int, seq_length: int) -> None:
    """Write config.json, tokenizer and text.jsonl to a new folder, for `--load-pretrained-model false`."""
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
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "max_position_embeddings": seq_length,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [json.dumps({"text": f"{number} is followed by {number + 1}. " * 20}) for number in range(200)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
