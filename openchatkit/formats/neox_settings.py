"""The model that GPT-NeoX's settings describe: its config.json.

The settings are those of a configuration to train by, or those that lie beside a checkpoint of GPT-NeoX.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

from openchatkit.errors import UserError
from openchatkit.models.config import ACTIVATION_FORMULAS
from openchatkit.models.neox_options import ATTENTION_KINDS, GATES, NeoxOptions, read_options

_EPSILONS = {
    "layernorm": "layernorm_epsilon",
    "non_parametric_layernorm": "layernorm_epsilon",
    "rmsnorm": "rms_norm_epsilon",
    "rmsnorm_2021": "rms_norm_epsilon",
    "scalenorm": "scalenorm_epsilon",
}


class NeoxSettings(Protocol):
    """Settings by GPT-NeoX's names, with the place of each for messages."""

    def get(self, name: str) -> Any:
        """Return a setting's value, or GPT-NeoX's default where it is not given."""

    def where(self, name: str) -> str:
        """Return where a setting was given, with its value."""

    def need(self, *names: str) -> Sequence[int]:
        """Return whole numbers that have no default; UserError for one that is missing or below 1."""


def describe_model(config: NeoxSettings, *, rows: int, inner_width: int | None = None) -> dict[str, Any]:
    """Return config.json of the model, whose embedding has so many `rows`; UserError for sizes that do not fit.

    `inner_width` is that of MLPs where it is known from weights: 2021 had another rule for gated ones.
    """
    layers, width, heads, positions = config.need(
        "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"
    )
    if width % heads:
        raise UserError(f"{config.where('hidden_size')} is no multiple of num_attention_heads {heads}: change one")
    activation, options = config.get("activation"), _choose_options(config, layers)
    if activation == "gelu" and config.get("bias_gelu_fusion"):
        activation = "gelu_fast"  # the fused kernel computes the tanh form
    raw = {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner_width or _inner_width(config, width),
        "max_position_embeddings": positions,
        "rotary_pct": config.get("rotary_pct"),
        "rotary_emb_base": config.get("rotary_emb_base"),
        "hidden_act": activation,
        "use_parallel_residual": config.get("gpt_j_residual"),
        "attention_bias": config.get("use_bias_in_attn_linear"),
        "tie_word_embeddings": not config.get("no_weight_tying"),
        **_describe_initialisation(config, layers, width),
    }
    epsilon = config.get(_EPSILONS[options.norm])
    if options == NeoxOptions() and activation in ACTIVATION_FORMULAS:
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            **raw,
            "layer_norm_eps": epsilon,
        }
    return {"model_type": "neox", **raw, "norm_eps": epsilon, **options.to_json()}


def _choose_options(config: NeoxSettings, layers: int) -> NeoxOptions:
    """Return what the settings choose beyond the family `gpt_neox`."""
    heads, key_heads, parallel = (
        config.get(name) for name in ("num_attention_heads", "num_kv_heads", "gpt_j_residual")
    )
    if key_heads is not None and (key_heads < 1 or heads % key_heads):
        raise UserError(f"{config.where('num_kv_heads')}: num_attention_heads {heads} is no multiple of it")
    grouped = key_heads not in (None, heads)
    if grouped and config.get("use_qk_layernorm"):
        raise UserError(
            f"{config.where('use_qk_layernorm')}: one norm serves queries and keys, of which num_kv_heads {key_heads} "
            "makes fewer: leave one of them out"
        )
    kinds = choose_attention(config, layers)
    is_sparse, is_relative = {*kinds} != {"global"}, config.get("pos_emb") == "rpe"
    chosen = {
        "norm": config.get("norm"),
        "use_qk_layernorm": config.get("use_qk_layernorm"),
        "gpt_j_tied": parallel and config.get("gpt_j_tied"),
        "num_kv_heads": key_heads if grouped else None,
        "use_bias_in_mlp": config.get("use_bias_in_mlp"),
        "pos_emb": config.get("pos_emb"),
        "hidden_dropout": config.get("hidden_dropout"),
        "attention_dropout": config.get("attention_dropout"),
        "sliding_window_width": config.get("sliding_window_width"),
    }
    if is_relative:
        chosen |= {name: config.get(name) for name in ("rpe_num_buckets", "rpe_max_distance")}
        chosen["rpe_scaled"] = config.get("rpe_rule") == "today"
    if is_sparse:
        settings = dict(config.get("sparsity_config") or {})
        chosen |= {"attention_config": kinds, "sparsity_config": {"seed": config.get("seed")} | settings}
    try:
        return read_options(chosen)
    except UserError as error:
        # Names are GPT-NeoX's, in this file as in those.
        raise UserError(str(error).removeprefix("config.json: ")) from error


def choose_attention(config: NeoxSettings, layers: int) -> list[str]:
    """Return the kind of attention of each layer; UserError for kinds that are no attention.

    `flash` names a kernel. With `sparsity`, which GPT-NeoX gave up in 2021, all layers or every second one are
    sparse_variable.
    """
    if (sparsity := config.get("sparsity")) != "none":
        if config.get("attention_config"):
            raise UserError(f"{config.where('sparsity')}: attention_config says the same: give one of them")
        return ["sparse_variable" if sparsity == "all" or number % 2 else "global" for number in range(layers)]
    kinds = ["global" if kind == "flash" else kind for kind in expand_attention(config, layers)]
    if strange := next((kind for kind in kinds if kind not in ATTENTION_KINDS), None):
        raise UserError(
            f"{config.where('attention_config')}: {strange}: another architecture: use {', '.join(ATTENTION_KINDS)}"
        )
    return kinds


def expand_attention(config: NeoxSettings, layers: int) -> list[str]:
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


def _inner_width(config: NeoxSettings, width: int) -> int:
    """Return the width of MLPs: `intermediate_size`, `expansion_factor` x hidden_size, or four times that.

    A gated one has a third of that: its first matrix has two thirds of the rows, one half of which goes through the
    activation and is multiplied by the other.
    """
    factor = config.get("expansion_factor")
    if config.get("intermediate_size") is not None:
        inner = config.need("intermediate_size")[0]
    else:
        inner = 4 * width if factor is None else int(factor * width)
    activation, unit = config.get("activation"), config.need("mlp_multiple_of")[0]
    if activation not in GATES:
        if unit != 1:
            raise UserError(f"{config.where('mlp_multiple_of')}: it is for gated activations: leave it out")
        return inner
    half, gated = _gated_widths(inner, unit)
    if half != gated:
        fitting = next(size for size in itertools.count(inner) if len({*_gated_widths(size, unit)}) == 1)
        raise UserError(
            f"{config.where('activation')} with intermediate_size {inner}: GPT-NeoX's first matrix has two halves of "
            f"{half:,} rows, its second {gated:,} columns: use intermediate_size {fitting}"
        )
    return gated


def _gated_widths(inner: int, unit: int) -> tuple[int, int]:
    """Return half the rows of a gated MLP's first matrix and the columns of its second, as GPT-NeoX rounds them."""
    target = int(inner * 2 / 3)
    return math.ceil(target / (2 * unit)) * unit, math.ceil(target // 2 / unit) * unit


def _describe_initialisation(config: NeoxSettings, layers: int, width: int) -> dict[str, Any]:
    """Return the keys of config.json that say how matrices are drawn, and those that write into the hidden state."""
    method, spread = _find_initialisation(config, "init_method", layers, width)
    output_method, output_spread = _find_initialisation(config, "output_layer_init_method", layers, width)
    raw: dict[str, Any] = {"initializer_range": spread, "output_initializer_range": output_spread}
    if {method, output_method} != {"normal"}:
        raw |= {"initializer": method, "output_initializer": output_method}
    return raw


def _find_initialisation(config: NeoxSettings, name: str, layers: int, width: int) -> tuple[str, float]:
    """Return the distribution of one of GPT-NeoX's initialisations, and its standard deviation or gain.

    small_init is of Nguyen and Salazar (arXiv 1910.05895), wang_init of mesh-transformer-jax.
    """
    std: float = config.get("init_method_std")
    return {
        "normal": ("normal", std),
        "scaled_normal": ("normal", std / math.sqrt(2 * layers)),
        "single_residual_scaled_normal": ("normal", std / math.sqrt(layers)),
        "small_init": ("normal", math.sqrt(2 / (5 * width))),
        "wang_init": ("normal", 2 / (layers * math.sqrt(width))),
        "xavier_uniform": ("xavier_uniform", 1.0),
        "xavier_normal": ("xavier_normal", 1.0),
        "orthogonal": ("orthogonal", math.sqrt(2)),
        "scaled_orthogonal": ("orthogonal", math.sqrt(2 / layers)),
    }[config.get(name)]
