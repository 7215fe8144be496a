"""GPT-J: GPT-J-6B, GPT-JT, GPT-JT-Moderation (Wang and Komatsuzaki, github.com/kingoflolz/mesh-transformer-jax).

Parameter names are those of the Hugging Face checkpoint without its prefixes.
"""

import re
from typing import Any

from torch import Tensor, nn

from openchatkit.models.cache import KVCache
from openchatkit.models.config import ModelConfig, get_positive_int
from openchatkit.models.family import Family
from openchatkit.models.layers import ACTIVATIONS, causal_attention, check_activation, rotate_pairs


class GPTJEmbed(nn.Module):
    """Token ids [batch, length] -> [batch, length, hidden_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.wte(tokens)
        return hidden


class GPTJAttention(nn.Module):
    """Causal self-attention with separate projections and no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        attended: Tensor = self.out_proj(causal_attention(query, key, value, mask))
        return attended


class GPTJMLP(nn.Module):
    """Two linear maps around the activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc_out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc_out(self.activation(self.fc_in(x)))
        return hidden


class GPTJLayer(nn.Module):
    """[batch, length, hidden_size] -> the same; attention and MLP read one norm and are added together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GPTJAttention(config)
        self.mlp = GPTJMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        normed = self.ln_1(x)
        mixed: Tensor = x + self.attn(normed, cos, sin, mask, cache) + self.mlp(normed)
        return mixed


class GPTJHead(nn.Module):
    """The final norm, and the projection to the vocabulary (with bias)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.ln_f(x)
        return normed


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Read a GPTJConfig, with sizes in GPT-2's spelling (`n_embd`) or the general one (`hidden_size`)."""
    hidden_size = get_positive_int(raw, "n_embd", "hidden_size")
    num_heads = get_positive_int(raw, "n_head", "num_attention_heads")
    return ModelConfig(
        family="gptj",
        vocab_size=get_positive_int(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=get_positive_int(raw, "n_layer", "num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=get_positive_int(raw, "n_inner", default=4 * hidden_size),
        max_position_embeddings=get_positive_int(raw, "n_positions", "max_position_embeddings", default=2048),
        rotary_dim=get_positive_int(raw, "rotary_dim", default=64),
        rotary_base=10000.0,
        activation=check_activation(raw.get("activation_function", "gelu_new")),
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        parallel_residual=True,
        attention_bias=False,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        init_std=float(raw.get("initializer_range", 0.02)),
    )


FAMILY = Family(
    name="gptj",
    config_from_hf=config_from_hf,
    embed=GPTJEmbed,
    layer=GPTJLayer,
    head=GPTJHead,
    norm="ln_f",
    projection="lm_head",
    embedding="wte",
    body_prefix="transformer.",
    layers_prefix="transformer.h.",
    projection_aliases=(),
    ignored=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)"),
)
