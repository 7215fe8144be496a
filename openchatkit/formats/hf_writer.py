"""A Hugging Face model's folder, written in one stream: sharded safetensors, config, generation config, tokenizer."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from openchatkit.formats.hf_model import GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX
from openchatkit.formats.layer_shards import CONFIG
from openchatkit.formats.tensor_file import TensorSpec, write_stream
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES, add_chat_template, copy_tokenizer, special_token_id
from openchatkit.models.config import ModelConfig
from openchatkit.storage import write_text

_MAX_SHARD_BYTES = 5_000_000_000
_FIXED_NAMES = (CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX)


def write_weights(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[memoryview]],
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Write tensors in the order of `specs`, into one file where they fit, else into numbered ones with an index."""
    groups: list[dict[str, TensorSpec]] = [{}]
    room = max_shard_bytes
    for key, spec in specs.items():
        if groups[-1] and spec.nbytes > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][key] = spec
        room -= spec.nbytes
    if len(groups) == 1:
        write_stream(folder / WEIGHTS, groups[0], chunks, hashed=False)
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_stream(folder / name, group, chunks, hashed=False)
        weight_map.update(dict.fromkeys(group, name))
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": weight_map}
    write_text(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")


def write_config(
    folder: Path, raw: Mapping[str, Any], config: ModelConfig, *, dtype: torch.dtype, tokenizer: Path
) -> None:
    """Write config.json and generation_config.json so that old and new releases of transformers read the same model.

    Rotary settings stand in both spellings; the end of text is the tokenizer's, or 0 for GPT-NeoX, whose class
    default (2) is not an end of text.
    """
    name = str(dtype).removeprefix("torch.")
    written = {k: v for k, v in raw.items() if k not in ("_name_or_path", "transformers_version")}
    if "rotary_dim" not in raw:
        rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
        fraction = _first(raw.get("rotary_pct"), rope.get("partial_rotary_factor"), config.rotary_dim / config.head_dim)
        base = _first(raw.get("rotary_emb_base"), rope.get("rope_theta"), config.rotary_base)
        new = {"rope_type": "default", "rope_theta": float(base), "partial_rotary_factor": fraction}
        written |= {"rotary_pct": fraction, "rotary_emb_base": base, "rope_parameters": new}
    tokens = _special_tokens(raw, config, tokenizer)
    written |= {"architectures": _architectures(raw), "dtype": name, "torch_dtype": name, **tokens}
    write_text(folder / CONFIG, json.dumps(written, indent=2, sort_keys=True) + "\n")
    tokens["pad_token_id"] = _first(special_token_id(tokenizer, "pad"), tokens["eos_token_id"])
    write_text(folder / GENERATION_CONFIG, json.dumps(tokens, indent=2, sort_keys=True) + "\n")


def write_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Copy the tokenizer, and make it render chats as the kit does."""
    copy_tokenizer(tokenizer, folder)
    add_chat_template(folder)


def may_replace(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only a converted model, so that another may take its place."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"a file"}
    written = {name for name in names if name in _FIXED_NAMES or name.endswith(".safetensors")}
    return not names or (CONFIG in written and not names - written - set(TOKENIZER_FILES))


def _special_tokens(raw: Mapping[str, Any], config: ModelConfig, tokenizer: Path) -> dict[str, Any]:
    fallback = 0 if config.family == "gpt_neox" else raw.get("eos_token_id")
    eos = _first(special_token_id(tokenizer, "eos"), fallback)
    return {"bos_token_id": _first(special_token_id(tokenizer, "bos"), eos), "eos_token_id": eos}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    """Return the model's class, for programs that look at it."""
    stated = [name for name in raw.get("architectures") or [] if name.endswith("ForCausalLM")]
    if stated:
        return stated
    from openchatkit.libraries import hf_transformers

    return [hf_transformers.causal_lm_class(raw["model_type"])]
