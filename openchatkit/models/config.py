"""Sizes and settings that the networks are built from, and how they are read from a config.json."""

from dataclasses import dataclass
from typing import Any

from openchatkit.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of a decoder-only transformer. `rotary_dim` counts the dimensions of a head that rotate.

    New matrices are drawn from normal(0, init_std), those that write into the hidden state from another spread if
    `output_init_std` gives one.
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

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"config.json: hidden size {self.hidden_size} is not a multiple of {self.num_heads} attention heads"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"config.json: {self.rotary_dim} rotary dimensions in heads of {self.head_dim}: "
                "an even number of at least 2 that fits the head is expected"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


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
