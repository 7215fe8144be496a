"""The model that a GPT-NeoX configuration describes: its config.json, its tokenizer, and the folder they start from.

Training from random weights needs no shards: the folder has config.json and the tokenizer's files.
"""

import itertools
import math
from pathlib import Path
from typing import Any

from openchatkit import storage
from openchatkit.errors import UserError
from openchatkit.formats import config_file, token_store, tokenizer_files
from openchatkit.neox.config import NeoxConfig
from openchatkit.tools.preprocess import neox_tokenizers
from openchatkit.tools.preprocess.neox_tokenizers import NeoxTokenizer

# Kinds of layers that are plain causal attention; `flash` names a kernel.
_PLAIN_ATTENTION = ("global", "flash")
_SPARSE_ATTENTION = ("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")


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
    lists = [config.get(name) or [] for name in ("train_data_paths", "valid_data_paths")]
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
    layers, width, heads, positions = config.need(
        "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"
    )
    if width % heads:
        raise UserError(f"{config.where('hidden_size')} is no multiple of num_attention_heads {heads}: change one")
    check_attention(config, layers)
    activation = config.get("activation")
    if activation == "gelu" and config.get("bias_gelu_fusion"):
        activation = "gelu_fast"  # the fused kernel computes the tanh form
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": pad_vocabulary(
            vocabulary,
            divisor=config.need("make_vocab_size_divisible_by")[0],
            parts=max(config.get("model_parallel_size"), 1),
        ),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": _inner_width(config, width),
        "max_position_embeddings": positions,
        "rotary_pct": config.get("rotary_pct"),
        "rotary_emb_base": config.get("rotary_emb_base"),
        "hidden_act": activation,
        "layer_norm_eps": config.get("layernorm_epsilon"),
        "use_parallel_residual": config.get("gpt_j_residual"),
        "attention_bias": config.get("use_bias_in_attn_linear"),
        "tie_word_embeddings": not config.get("no_weight_tying"),
        "initializer_range": _spread(config, "init_method", layers, width),
        "output_initializer_range": _spread(config, "output_layer_init_method", layers, width),
    }


def check_attention(config: NeoxConfig, layers: int) -> None:
    """Raise UserError unless each layer has plain attention over all tokens before, by as many key heads as queries."""
    kinds = expand_attention(config, layers)
    if strange := next((kind for kind in kinds if kind not in _PLAIN_ATTENTION), None):
        known = strange in _SPARSE_ATTENTION
        why = "the kit's trainer has no sparse layers yet: use global" if known else "another architecture: use global"
        raise UserError(f"{config.where('attention_config')}: {strange}: {why}")
    heads = config.get("num_kv_heads")
    if heads not in (None, config.get("num_attention_heads")):
        raise UserError(
            f"{config.where('num_kv_heads')}: the kit's GPT-NeoX has no grouped queries yet: leave it out, or make it "
            f"num_attention_heads {config.get('num_attention_heads')}"
        )


def expand_attention(config: NeoxConfig, layers: int) -> list[str]:
    """Return the kind of each layer that `attention_config` says: `[[["local", "global"], "all"]]` for example."""
    given = config.get("attention_config")
    if not given:
        return ["global"] * layers
    if all(isinstance(kind, str) for kind in given):
        kinds = list(given)
    else:
        kinds = []
        for entry in given:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list) or not entry[0]:
                raise UserError(f'{config.where("attention_config")}: expected entries such as [["global"], 12]')
            names, times = entry
            if times == "all":
                if layers % len(names):
                    raise UserError(
                        f"{config.where('attention_config')}: num_layers {layers} is no multiple of {len(names)} kinds"
                    )
                kinds = names * (layers // len(names))
                break
            if not isinstance(times, int):
                raise UserError(f'{config.where("attention_config")}: expected a number of times, or "all"')
            kinds += names * times
    if len(kinds) != layers:
        raise UserError(f"{config.where('attention_config')}: it is of {len(kinds)} layers, num_layers is {layers}")
    return [str(kind) for kind in kinds]


def _inner_width(config: NeoxConfig, width: int) -> int:
    """Return the width of MLPs: `intermediate_size`, `expansion_factor` x hidden_size, or four times that."""
    if config.get("intermediate_size") is not None:
        return config.need("intermediate_size")[0]
    factor = config.get("expansion_factor")
    return 4 * width if factor is None else int(factor * width)


def _spread(config: NeoxConfig, name: str, layers: int, width: int) -> float:
    """Return the standard deviation of an initialisation that draws from a normal distribution of mean 0.

    small_init is of Nguyen and Salazar (arXiv 1910.05895), wang_init of mesh-transformer-jax.
    """
    std: float = config.get("init_method_std")
    deviations = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2 * layers),
        "single_residual_scaled_normal": std / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * width)),
        "wang_init": 2 / (layers * math.sqrt(width)),
    }
    return deviations[config.get(name)]


def is_written(folder: Path) -> bool:
    """Return whether `write_model` has written a folder, for whatever configuration."""
    return (folder / config_file.CONFIG).is_file()


def write_model(folder: Path, config: NeoxConfig, *, resumes: bool) -> None:
    """Write the folder that training starts from, unless it is there already. Every rank may call this at once.

    A run that `resumes` keeps its embedding's rows, which depend on the tensor ranks it was started with.
    """
    tokenizer = load_tokenizer(config)
    serialised, end = tokenizer.to_json(), tokenizer.end_of_text
    assert serialised is not None, "load_tokenizer refuses it"
    assert end is not None, "load_tokenizer refuses it"
    raw = make_config(config, tokenizer.vocab_size) | {"bos_token_id": end, "eos_token_id": end}
    before = config_file.read_raw(folder) if is_written(folder) else {}
    rows, parts = before.get("vocab_size", 0), max(config.get("model_parallel_size"), 1)
    if resumes and rows >= tokenizer.vocab_size and rows % parts == 0:
        raw["vocab_size"] = rows
    if before == raw and tokenizer_files.read_tokenizer(folder) == serialised:
        return
    with storage.storage_errors(folder), storage.hold_lock(storage.lock_path(folder), f"waiting for {folder}"):
        tokenizer_files.write_tokenizer(folder, serialised, **_name_special_tokens(serialised, end))
        config_file.write_raw(folder, raw)


def _name_special_tokens(serialised: str, end: int) -> dict[str, str]:
    """Return end-of-text and padding as a tokenizer writes them; one without padding pads with end-of-text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialised)
    end_of_text = str(tokenizer.id_to_token(end))
    padded = tokenizer.token_to_id(neox_tokenizers.PADDING) is not None
    return {"end_of_text": end_of_text, "padding": neox_tokenizers.PADDING if padded else end_of_text}
