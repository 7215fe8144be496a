"""GPT-J: GPT-J-6B, GPT-JT, GPT-JT-Moderation (Wang and Komatsuzaki, github.com/kingoflolz/mesh-transformer-jax).

Parameter names are those of the Hugging Face checkpoint without its prefixes. Modules may be parts (see `cuts`):
`enter` is where the hidden state that all parts have goes into one, `leave` where the parts' results are added up.
"""

import re
from typing import Any

from torch import Tensor, nn

from openchatkit.models.cache import KVCache
from openchatkit.models.config import ModelConfig, check_activation, get_positive_int
from openchatkit.models.cuts import WHOLE, Cut, Part
from openchatkit.models.documents import Seen
from openchatkit.models.family import Family
from openchatkit.models.layers import ACTIVATIONS, VocabularyRows, causal_attention, rotate_pairs


class GPTJEmbed(nn.Module):
    """Token ids [batch, length] -> [batch, length, hidden_size]."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.wte = VocabularyRows(config, part)
        self.leave: nn.Module = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.leave(self.wte(tokens))
        return hidden


class GPTJAttention(nn.Module):
    """Causal self-attention with separate projections and no biases."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.num_heads = part.share(config.num_heads)
        width = self.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen | None, cache: KVCache | None = None) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        attended: Tensor = self.out_proj(causal_attention(query, key, value, seen))
        return attended


class GPTJMLP(nn.Module):
    """Two linear maps around the activation."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        width = part.share(config.intermediate_size)
        self.fc_in = nn.Linear(config.hidden_size, width)
        self.fc_out = nn.Linear(width, config.hidden_size, bias=part.index == 0)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc_out(self.activation(self.fc_in(x)))
        return hidden


class GPTJLayer(nn.Module):
    """[batch, length, hidden_size] -> the same; attention and MLP read one norm and are added together.

    The norm is behind the seam, so its gradient in a part is a share.
    """

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GPTJAttention(config, part)
        self.mlp = GPTJMLP(config, part)
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Seen | None, cache: KVCache | None = None) -> Tensor:
        normed = self.ln_1(self.enter(x))
        mixed: Tensor = x + self.leave(self.attn(normed, cos, sin, seen, cache) + self.mlp(normed))
        return mixed


class GPTJHead(nn.Module):
    """The final norm, and the projection to the vocabulary (with bias)."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, part.share(config.vocab_size))
        self.enter: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.ln_f(self.enter(x))
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


CUTS: dict[str, Cut] = {
    "wte.weight": "rows",
    "ln_1.weight": "whole",
    "ln_1.bias": "whole",
    "attn.q_proj.weight": "rows",
    "attn.k_proj.weight": "rows",
    "attn.v_proj.weight": "rows",
    "attn.out_proj.weight": "columns",
    "mlp.fc_in.weight": "rows",
    "mlp.fc_in.bias": "rows",
    "mlp.fc_out.weight": "columns",
    "mlp.fc_out.bias": "once",
    "ln_f.weight": "whole",
    "ln_f.bias": "whole",
    "lm_head.weight": "rows",
    "lm_head.bias": "rows",
}

FAMILY = Family(
    name="gptj",
    config_from_hf=config_from_hf,
    embed=GPTJEmbed,
    layer=GPTJLayer,
    head=GPTJHead,
    cuts=lambda _: CUTS,
    norm="ln_f",
    projection="lm_head",
    embedding="wte",
    body_prefix="transformer.",
    layers_prefix="transformer.h.",
    projection_aliases=(),
    ignored=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)"),
)
