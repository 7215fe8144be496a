"""The choices of GPT-NeoX's settings beyond the architecture of GPT-NeoX-20B: values alone, read from a config.json.

Names are those of GPT-NeoX's settings. The network that they choose is in `neox`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from openchatkit.errors import UserError
from openchatkit.models.sparsity import SPARSE_KINDS, read_sparsity

NORMS = ("layernorm", "rmsnorm", "rmsnorm_2021", "scalenorm", "non_parametric_layernorm")
"""Kinds of norms; rmsnorm_2021 is GPT-NeoX's until May 2025, which adds epsilon to the root instead of the mean."""
POSITIONS = ("learned", "sinusoidal", "rotary", "rpe", "alibi", "none")
ATTENTION_KINDS = ("global", *SPARSE_KINDS)
GATES = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu", "glu": "sigmoid", "bilinear": "identity"}
"""The activations that multiply one half of what the first matrix of an MLP makes by the other, and their functions."""

Setting = str | int | float | bool | None | tuple["Setting", ...]


@dataclass(frozen=True)
class NeoxOptions:
    """The choices; the defaults are the architecture of GPT-NeoX-20B.

    `attention_config` names the kind of attention of each layer, and is empty where all are global; `sparsity_config`
    holds the settings of sparse ones as pairs of name and value. `rpe_scaled`: the relative position bias is multiplied
    by the root of the head's width, as GPT-NeoX does since January 2022. `num_kv_heads` None: as many as heads.
    """

    norm: str = "layernorm"
    use_qk_layernorm: bool = False
    gpt_j_tied: bool = False
    num_kv_heads: int | None = None
    use_bias_in_mlp: bool = True
    pos_emb: str = "rotary"
    rpe_num_buckets: int = 32
    rpe_max_distance: int = 128
    rpe_scaled: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    sliding_window_width: int | None = None
    attention_config: tuple[str, ...] = ()
    sparsity_config: tuple[tuple[str, Setting], ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool) and not isinstance(value := getattr(self, field.name), bool):
                raise UserError(f"config.json: {field.name} is {value!r}, expected true or false")
        _check_choice("norm", self.norm, NORMS)
        _check_choice("pos_emb", self.pos_emb, POSITIONS)
        for kind in self.attention_config:
            _check_choice("attention_config", kind, ATTENTION_KINDS)
        sparsity = read_sparsity(dict(self.sparsity_config))
        for kind in self.attention_config:
            sparsity.check(kind)
        if self.sliding_window_width is not None and {*self.attention_config} - {"global"}:
            raise UserError(
                "config.json: sliding_window_width is of layers with global attention: leave it out, or sparse layers"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            rate = getattr(self, name)
            if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise UserError(f"config.json: {name} is {rate!r}, expected a number of at least 0 and below 1")
        buckets, farthest = self.rpe_num_buckets, self.rpe_max_distance
        if type(buckets) is not int or buckets < 2 or buckets % 2:
            raise UserError(f"config.json: rpe_num_buckets is {buckets!r}, expected an even number of at least 2")
        if type(farthest) is not int or farthest <= buckets // 2:
            raise UserError(
                f"config.json: rpe_max_distance is {farthest!r}, expected more than half of rpe_num_buckets {buckets}"
            )
        for name in ("num_kv_heads", "sliding_window_width"):
            if (number := getattr(self, name)) is not None and (type(number) is not int or number < 1):
                raise UserError(f"config.json: {name} is {number!r}, expected a positive whole number, or null")
        if self.use_qk_layernorm and self.num_kv_heads is not None:
            raise UserError(
                "config.json: use_qk_layernorm has one norm for queries and keys, of which num_kv_heads makes fewer: "
                "leave one of them out"
            )

    @property
    def drops_out(self) -> bool:
        """Whether training drops anything out."""
        return self.hidden_dropout > 0 or self.attention_dropout > 0

    def to_json(self) -> dict[str, Any]:
        """Return the keys of config.json that say this, those at their defaults too."""
        return dataclasses.asdict(self) | {
            "attention_config": list(self.attention_config),
            "sparsity_config": {name: _thaw(value) for name, value in self.sparsity_config},
        }


def read_options(raw: dict[str, Any]) -> NeoxOptions:
    """Read the options of a config.json; those that it lacks are at their defaults. UserError for unknown values."""
    given = {field.name: raw[field.name] for field in dataclasses.fields(NeoxOptions) if field.name in raw}
    kinds, sparsity = given.get("attention_config") or [], given.get("sparsity_config") or {}
    if not isinstance(kinds, list) or not isinstance(sparsity, dict):
        raise UserError("config.json: attention_config is a list of a kind for each layer, sparsity_config a block")
    return NeoxOptions(
        **given
        | {
            "attention_config": tuple(kinds),
            "sparsity_config": tuple((name, _freeze(value)) for name, value in sorted(sparsity.items())),
        }
    )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"config.json: {name} is {value!r}, expected one of {', '.join(choices)}")


def _freeze(value: Any) -> Setting:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _thaw(value: Setting) -> Any:
    return list(map(_thaw, value)) if isinstance(value, tuple) else value
