"""GPT-NeoX: Pythia, GPT-NeoX-20B, RedPajama-INCITE, Dolly v2, StableLM-alpha (Black et al., arXiv 2204.06745).

Parameter names are those of the Hugging Face checkpoint without its prefixes. Modules may be parts (see `cuts`):
`enter` is where the hidden state that all parts have goes into one, `leave` where the parts' results are added up.
"""

import re
from typing import Any

from torch import Tensor, nn

from openchatkit.errors import UserError
from openchatkit.models.cache import KVCache
from openchatkit.models.config import ModelConfig, check_activation, get_first, get_positive_int
from openchatkit.models.cuts import WHOLE, Cut, Part
from openchatkit.models.documents import Seen
from openchatkit.models.family import Family
from openchatkit.models.initialisation import check_method
from openchatkit.models.layers import ACTIVATIONS, VocabularyRows, causal_attention, rotate_halves


class GPTNeoXEmbed(nn.Module):
    """Token ids [batch, length] -> [batch, length, hidden_size]."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.embed_in = VocabularyRows(config, part)
        self.leave: nn.Module = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.leave(self.embed_in(tokens))
        return hidden


class GPTNeoXAttention(nn.Module):
    """Causal self-attention; the rows of `query_key_value` are q, k, v of head 0, then of head 1, and so on."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.num_heads = part.share(config.num_heads)
        width = self.num_heads * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=config.attention_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.attention_bias and part.index == 0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen | None, cache: KVCache | None = None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        attended: Tensor = self.dense(causal_attention(query, key, value, seen))
        return attended


class GPTNeoXMLP(nn.Module):
    """Two linear maps around the activation."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        width = part.share(config.intermediate_size)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, width)
        self.dense_4h_to_h = nn.Linear(width, config.hidden_size, bias=part.index == 0)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))
        return hidden


class GPTNeoXLayer(nn.Module):
    """[batch, length, hidden_size] -> the same; `cos`, `sin` are of the tokens' positions, `seen` is what they see.

    With parallel residual, attention and MLP read the same hidden state and are added before they leave: one seam in
    and one out. The norms are behind the seam, so their gradients in a part are shares.
    """

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = GPTNeoXAttention(config, part)
        self.mlp = GPTNeoXMLP(config, part)
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen | None, cache: KVCache | None = None) -> Tensor:
        y = self.enter(x)
        added: Tensor = self.attention(self.input_layernorm(y), cos, sin, seen, cache)
        if not self.parallel_residual:
            x = x + self.leave(added)
            y = self.enter(x)
        mlp: Tensor = self.mlp(self.post_attention_layernorm(y))
        mixed: Tensor = x + self.leave(added + mlp if self.parallel_residual else mlp)
        return mixed


class GPTNeoXHead(nn.Module):
    """The final norm, and the projection to the vocabulary (without bias)."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, part.share(config.vocab_size), bias=False)
        self.enter: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.final_layer_norm(self.enter(x))
        return normed


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Read a GPTNeoXConfig, with its rotary settings in the old spelling, the new one or both."""
    hidden_size, num_heads = get_positive_int(raw, "hidden_size"), get_positive_int(raw, "num_attention_heads")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rotary scaling {kind!r} is not supported; only plain rotary embeddings are")
    spellings = {
        "rotary_pct": raw.get("rotary_pct"),
        "rope_parameters.partial_rotary_factor": rope.get("partial_rotary_factor"),
    }
    fraction = get_first(spellings, *spellings, default=0.25)
    spellings = {"rotary_emb_base": raw.get("rotary_emb_base"), "rope_parameters.rope_theta": rope.get("rope_theta")}
    base = get_first({name: value and float(value) for name, value in spellings.items()}, *spellings, default=10000.0)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=get_positive_int(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=get_positive_int(raw, "num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=get_positive_int(raw, "intermediate_size", default=4 * hidden_size),
        max_position_embeddings=get_positive_int(raw, "max_position_embeddings", default=2048),
        rotary_dim=int(hidden_size // num_heads * float(fraction)),
        rotary_base=float(base),
        activation=check_activation(raw.get("hidden_act", "gelu")),
        norm_eps=float(raw.get("layer_norm_eps", 1e-5)),
        parallel_residual=bool(raw.get("use_parallel_residual", True)),
        attention_bias=bool(raw.get("attention_bias", True)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        init_std=float(raw.get("initializer_range", 0.02)),
        # The kit's own: transformers has one normal distribution for all.
        output_init_std=raw.get("output_initializer_range"),
        init_method=check_method(raw.get("initializer", "normal")),
        output_init_method=raw.get("output_initializer") and check_method(raw["output_initializer"]),
    )


CUTS: dict[str, Cut] = {
    "embed_in.weight": "rows",
    "input_layernorm.weight": "whole",
    "input_layernorm.bias": "whole",
    "post_attention_layernorm.weight": "whole",
    "post_attention_layernorm.bias": "whole",
    "attention.query_key_value.weight": "rows",
    "attention.query_key_value.bias": "rows",
    "attention.dense.weight": "columns",
    "attention.dense.bias": "once",
    "mlp.dense_h_to_4h.weight": "rows",
    "mlp.dense_h_to_4h.bias": "rows",
    "mlp.dense_4h_to_h.weight": "columns",
    "mlp.dense_4h_to_h.bias": "once",
    "final_layer_norm.weight": "whole",
    "final_layer_norm.bias": "whole",
    "embed_out.weight": "rows",
}

FAMILY = Family(
    name="gpt_neox",
    config_from_hf=config_from_hf,
    embed=GPTNeoXEmbed,
    layer=GPTNeoXLayer,
    head=GPTNeoXHead,
    cuts=lambda _: CUTS,
    norm="final_layer_norm",
    projection="embed_out",
    embedding="embed_in",
    body_prefix="gpt_neox.",
    layers_prefix="gpt_neox.layers.",
    projection_aliases=("lm_head",),
    ignored=re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\..*)|gpt_neox\.rotary_emb\..*"),
)
