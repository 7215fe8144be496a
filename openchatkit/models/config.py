"""Sizes and settings that the networks are built from, and how they are read from a config.json."""

import math
from dataclasses import dataclass, field
from typing import Any

from openchatkit.errors import UserError
from openchatkit.models.neox_options import NeoxOptions

# Every `hidden_act` that published GPT-NeoX and GPT-J checkpoints name, and those of GPT-NeoX's settings that
# transformers knows, with its formula: "tanh_gelu" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
ACTIVATION_FORMULAS = {
    "gelu": "erf_gelu",
    "gelu_fast": "tanh_gelu",
    "gelu_new": "tanh_gelu",
    "gelu_pytorch_tanh": "tanh_gelu",
    "mish": "mish",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a decoder-only transformer. `rotary_dim` counts the dimensions of a head that rotate.

    New matrices are drawn as `init_method` and `init_std` say (see `initialisation`), those that write into the hidden
    state as `output_init_method` and `output_init_std` do where these are given. `options` are of the family `neox`
    alone, whose others have the defaults.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    rotary_dim: int
    rotary_base: float
    activation: str
    norm_eps: float
    parallel_residual: bool
    attention_bias: bool
    tie_embeddings: bool
    init_std: float
    output_init_std: float | None = None
    init_method: str = "normal"
    output_init_method: str | None = None
    options: NeoxOptions = field(default_factory=NeoxOptions)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"config.json: hidden size {self.hidden_size} is not a multiple of {self.num_heads} attention heads"
            )
        if self.num_heads % self.num_key_heads:
            raise UserError(
                f"config.json: {self.num_heads} attention heads are not a multiple of num_kv_heads {self.num_key_heads}"
            )
        if self.options.gpt_j_tied and not self.parallel_residual:
            raise UserError("config.json: gpt_j_tied needs use_parallel_residual: one norm serves attention and MLP")
        if len(self.options.attention_config) not in (0, self.num_layers):
            raise UserError(
                f"config.json: attention_config is of {len(self.options.attention_config)} layers, the model has "
                f"{self.num_layers}"
            )
        if self.options.pos_emb != "rotary":
            assert self.rotary_dim == 0, f"{self.rotary_dim} rotary dimensions with {self.options.pos_emb} positions"
        elif self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config.json: {self.rotary_dim} rotary dimensions in heads of {self.head_dim}: "
                "an even number of at least 2 that fits the head is expected"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_key_heads(self) -> int:
        """Heads of keys and values, each of which serves as many heads of queries."""
        return self.options.num_kv_heads or self.num_heads


def check_activation(name: str) -> str:
    """Return `name` if the kit has this activation; UserError lists those it has."""
    if name not in ACTIVATION_FORMULAS:
        raise UserError(f"config.json: activation {name!r} is not supported; known: {', '.join(ACTIVATION_FORMULAS)}")
    return name


def get_first(raw: dict[str, Any], *names: str, default: Any = None) -> Any:
    """Return the value of the first of `names` that config.json holds; UserError when several disagree."""
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    if len(set(map(str, found.values()))) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(f"config.json contradicts itself: {listed}; keep the one the weights were trained with")
    return next(iter(found.values()), default)


def get_positive_int(raw: dict[str, Any], *names: str, default: int | None = None) -> int:
    """Return a positive whole number from config.json; UserError when it is missing or anything else."""
    value = get_first(raw, *names, default=default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {names[0]} is {value!r}, expected a positive whole number")
    return value


def get_number(raw: dict[str, Any], name: str, default: float) -> float:
    """Return a number of at least 0 from config.json, or `default`; UserError when it is anything else."""
    value = raw.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UserError(f"config.json: {name} is {value!r}, expected a number of at least 0")
    return float(value)


def get_truth(raw: dict[str, Any], name: str, default: bool) -> bool:
    """Return true or false from config.json, or `default`; UserError when it is anything else."""
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {name} is {value!r}, expected true or false")
    return value
