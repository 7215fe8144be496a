"""GPT-NeoX: Pythia, GPT-NeoX-20B, RedPajama-INCITE, Dolly v2, StableLM-alpha (Black et al., arXiv 2204.06745).

Parameter names are those of the Hugging Face checkpoint without its prefixes.
"""

import re
from typing import Any

from torch import Tensor, nn

from openchatkit.errors import UserError
from openchatkit.models.cache import KVCache
from openchatkit.models.config import ModelConfig, get_first, get_positive_int
from openchatkit.models.family import Family
from openchatkit.models.layers import ACTIVATIONS, causal_attention, check_activation, rotate_halves


class GPTNeoXEmbed(nn.Module):
    """Token ids [batch, length] -> [batch, length, hidden_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embed_in(tokens)
        return hidden


class GPTNeoXAttention(nn.Module):
    """Causal self-attention; the rows of `query_key_value` are q, k, v of head 0, then of head 1, and so on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        attended: Tensor = self.dense(causal_attention(query, key, value, mask))
        return attended


class GPTNeoXMLP(nn.Module):
    """Two linear maps around the activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))
        return hidden


class GPTNeoXLayer(nn.Module):
    """[batch, length, hidden_size] -> the same; `cos`, `sin` are of the tokens' positions, `mask` of what they see."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = GPTNeoXAttention(config)
        self.mlp = GPTNeoXMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        attended = x + self.attention(self.input_layernorm(x), cos, sin, mask, cache)
        mlp_input = x if self.parallel_residual else attended
        mixed: Tensor = attended + self.mlp(self.post_attention_layernorm(mlp_input))
        return mixed


class GPTNeoXHead(nn.Module):
    """The final norm, and the projection to the vocabulary (without bias)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.final_layer_norm(x)
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
    )


FAMILY = Family(
    name="gpt_neox",
    config_from_hf=config_from_hf,
    embed=GPTNeoXEmbed,
    layer=GPTNeoXLayer,
    head=GPTNeoXHead,
    norm="final_layer_norm",
    projection="embed_out",
    embedding="embed_in",
    body_prefix="gpt_neox.",
    layers_prefix="gpt_neox.layers.",
    projection_aliases=("lm_head",),
    ignored=re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\..*)|gpt_neox\.rotary_emb\..*"),
)
