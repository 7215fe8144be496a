"""The model that a GPT-NeoX configuration describes: its config.json, its tokenizer, and the folder they start from.

Training from random weights needs no shards: the folder has config.json and the tokenizer's files.
"""

import itertools
import math
from pathlib import Path
from typing import Any

from openchatkit import storage
from openchatkit.errors import UserError
from openchatkit.formats import config_file, neox_settings, neox_tokenizers, token_store, tokenizer_files
from openchatkit.formats.neox_tokenizers import NeoxTokenizer
from openchatkit.neox.config import NeoxConfig


def load_tokenizer(config: NeoxConfig) -> NeoxTokenizer:
    """Load the configuration's tokenizer; UserError where a file is missing, or it is of no kind to train with.

    Where no `tokenizer_type` is given it is the one that made the data, if that is known, else GPT-NeoX's default.
    """
    chosen = find_tokenizer(config)
    kind = chosen["tokenizer_type"]
    # Configurations name GPT-2's files whatever tokenizer is chosen.
    vocab = None if kind == "CharLevelTokenizer" else chosen.get("vocab_file")
    merges = chosen.get("merge_file") if kind == "GPT2BPETokenizer" else None
    if vocab is None and kind == "HFGPT2Tokenizer":
        vocab = "gpt2"  # GPT-NeoX's default
    loaded = neox_tokenizers.load(kind, vocab and Path(vocab), merges and Path(merges))
    if loaded.to_json() is None:
        raise UserError(f"tokenizer_type {kind}: training needs one of the tokenizers library: use HFTokenizer")
    if loaded.end_of_text is None:
        raise UserError(f"{config.where('vocab_file')}: the tokenizer has no {neox_tokenizers.END_OF_TEXT} token")
    return loaded


def find_tokenizer(config: NeoxConfig) -> dict[str, Any]:
    """Return tokenizer_type, vocab_file and merge_file: the configuration's, or those that made its data."""
    if "tokenizer_type" not in config.given and (maker := find_maker(config)):
        return maker
    return {name: config.get(name) for name in ("tokenizer_type", "vocab_file", "merge_file")}


def find_maker(config: NeoxConfig) -> dict[str, str]:
    """Return which tokenizer made the configuration's data, by the same names; nothing where it is not known.

    UserError where stores were made by several.
    """
    found: dict[str, str] = {}
    lists = [config.get(name) or [] for name in ("train_data_paths", "valid_data_paths", "test_data_paths")]
    for path in filter(None, [config.get("data_path"), *itertools.chain(*lists)]):
        prefix = token_store.find_prefix(Path(path))
        maker = {} if prefix is None else token_store.read_maker(prefix)
        if (kind := maker.get("tokenizer_type")) not in neox_tokenizers.KINDS:
            continue
        if found and kind != found["tokenizer_type"]:
            raise UserError(f"{path} was made by {kind}, other stores by {found['tokenizer_type']}: make all by one")
        found = found or maker
    return found


def pad_vocabulary(size: int, *, divisor: int, parts: int) -> int:
    """Return the rows of the embedding: `size` rounded up to a multiple of `divisor` x tensor ranks."""
    unit = divisor * parts
    return math.ceil(size / unit) * unit


def make_config(config: NeoxConfig, vocabulary: int) -> dict[str, Any]:
    """Return config.json of the model, for a tokenizer of `vocabulary` ids; UserError for sizes that do not fit."""
    rows = pad_vocabulary(
        vocabulary,
        divisor=config.need("make_vocab_size_divisible_by")[0],
        parts=max(config.get("model_parallel_size"), 1),
    )
    return neox_settings.describe_model(config, rows=rows)


def is_written(folder: Path) -> bool:
    """Return whether `write_model` has written a folder, for whatever configuration."""
    return (folder / config_file.CONFIG).is_file()


def write_model(folder: Path, config: NeoxConfig, *, resumes: bool) -> None:
    """Write the folder that training starts from, unless it is there already. Every rank may call this at once.

    A run that `resumes` keeps its embedding's rows, which depend on the tensor ranks it was started with.
    """
    tokenizer = load_tokenizer(config)
    end = tokenizer.end_of_text
    raw = make_config(config, tokenizer.vocab_size) | {"bos_token_id": end, "eos_token_id": end}
    before = config_file.read_raw(folder) if is_written(folder) else {}
    rows, parts = before.get("vocab_size", 0), max(config.get("model_parallel_size"), 1)
    if resumes and rows >= tokenizer.vocab_size and rows % parts == 0:
        raw["vocab_size"] = rows
    if before == raw and tokenizer_files.read_tokenizer(folder) == tokenizer.to_json():
        return
    with storage.storage_errors(folder), storage.hold_lock(storage.lock_path(folder), f"waiting for {folder}"):
        neox_tokenizers.write(tokenizer, folder)
        config_file.write_raw(folder, raw)
