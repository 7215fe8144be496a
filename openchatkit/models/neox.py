"""GPT-NeoX with any of its settings' options (see `neox_options`): the kit's own family, which transformers lacks.

Models without an option are of the family `gpt_neox`. Parameter names are those of that family, of GPT-NeoX's files
where it has none. Modules may be parts (see `cuts`), with seams `enter` and `leave` as in `gpt_neox`.
"""

import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from openchatkit.errors import UserError
from openchatkit.libraries import pytorch
from openchatkit.models.cache import KVCache
from openchatkit.models.config import ModelConfig, get_number, get_positive_int, get_truth
from openchatkit.models.cuts import WHOLE, Cut, Part, StackedRows
from openchatkit.models.dropout import ATTENTION_OUTPUT, EMBEDDING, MLP_OUTPUT, attend_with_dropout, drop_hidden
from openchatkit.models.family import Family
from openchatkit.models.initialisation import check_method
from openchatkit.models.layers import (
    ACTIVATIONS,
    VocabularyRows,
    causal_attention,
    grouped_attention,
    rotate_halves,
)
from openchatkit.models.neox_options import GATES, NeoxOptions, read_options
from openchatkit.models.norms import make_norm
from openchatkit.models.positions import RelativeBias, SinusoidalTable
from openchatkit.models.views import BlocksSeen, EmbeddingView, LayerView

_OUTPUT_SPREAD = "output_initializer_range"
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "softsign": F.softsign,
    "sigmoid": F.sigmoid,
    "identity": nn.Identity(),
}


class NeoxEmbed(nn.Module):
    """Token ids [batch, length] -> [batch, length, hidden_size], with what is added for their positions.

    The first part has the table of learned positions, and adds it, since the parts' results are added up.
    """

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.embed_in = VocabularyRows(config, part)
        self.leave: nn.Module = nn.Identity()
        self.dropout, kind, width = config.options.hidden_dropout, config.options.pos_emb, config.hidden_size
        adds = part.index == 0
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, width) if adds and kind == "learned" else None
        )
        self.sinusoidal = SinusoidalTable(width) if adds and kind == "sinusoidal" else None

    def forward(self, tokens: Tensor, view: EmbeddingView) -> Tensor:
        embedded = self.embed_in(tokens)
        if self.position_embeddings is not None:
            embedded = embedded + self.position_embeddings(view.positions)
        if self.sinusoidal is not None:
            embedded = embedded + self.sinusoidal(view.positions, view.reach).to(embedded.dtype)
        # Before the parts are added up: all of them drop the same.
        hidden: Tensor = self.leave(drop_hidden(embedded, view.keys, EMBEDDING, self.dropout))
        return hidden


class NeoxAttention(nn.Module):
    """Causal self-attention, with as many heads of keys as of queries, or fewer, and with norms of both or without.

    The rows of `query_key_value` are q, k, v of head 0, then of head 1, and so on; with fewer heads of keys, all of q,
    all of k, all of v. One norm serves queries and keys.
    """

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        options, self.head_dim = config.options, config.head_dim
        self.is_rotary = options.pos_emb == "rotary"
        self.num_heads, self.num_key_heads = part.share(config.num_heads), part.share(config.num_key_heads)
        width, key_width = self.num_heads * self.head_dim, self.num_key_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width + 2 * key_width, bias=config.attention_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.attention_bias and part.index == 0)
        self.qk_layernorm = (
            make_norm(options.norm, width, config.norm_eps, groups=self.num_heads) if options.use_qk_layernorm else None
        )
        self.dropout, self.first_head = options.attention_dropout, part.first(config.num_heads)
        self.rpe = (
            RelativeBias(
                options.rpe_num_buckets,
                self.num_heads,
                factor=self.head_dim**0.5 if options.rpe_scaled else 1.0,
            )
            if options.pos_emb == "rpe"
            else None
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: LayerView, cache: KVCache | None = None) -> Tensor:
        query, key, value = self._project(x)
        if self.qk_layernorm is not None:
            norm = self.qk_layernorm
            query, key = (norm(heads.flatten(-2)).unflatten(-1, (-1, self.head_dim)) for heads in (query, key))
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if self.is_rotary:
            query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        attended: Tensor = self.dense(self._attend(query, key, value, view))
        return attended

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, view: LayerView) -> Tensor:
        seen = view.seen
        if self.rpe is not None:
            assert isinstance(seen, Tensor), type(seen)
            assert view.buckets is not None
            seen = seen + self.rpe(view.buckets, query.shape[2]).to(seen.dtype)
        if self.dropout and view.keys is not None:
            assert isinstance(seen, Tensor), type(seen)
            return attend_with_dropout(
                query, key, value, seen, view.keys, rate=self.dropout, first_head=self.first_head
            )
        if isinstance(seen, BlocksSeen):
            times = self.num_heads // self.num_key_heads
            key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
            return pytorch.attend_to_blocks(query, key, value, seen.mask).transpose(1, 2).flatten(-2)
        attend = causal_attention if self.num_key_heads == self.num_heads else grouped_attention
        return attend(query, key, value, seen)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [batch, length, heads, head_dim]."""
        mixed = self.query_key_value(x)
        if self.num_key_heads == self.num_heads:
            query, key, value = mixed.unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
            return query, key, value
        heads = mixed.unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split([self.num_heads, self.num_key_heads, self.num_key_heads], dim=-2)
        return query, key, value


class NeoxMLP(nn.Module):
    """Two linear maps around the activation; a gated one multiplies one half of the first map by that of the other.

    The rows of a gated `dense_h_to_4h` are those to be multiplied, then those that go through the activation.
    """

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.is_gated = config.activation in GATES
        self.activation = _FUNCTIONS[GATES.get(config.activation, config.activation)]
        width, bias = part.share(config.intermediate_size), config.options.use_bias_in_mlp
        self.dense_h_to_4h = nn.Linear(config.hidden_size, width * (2 if self.is_gated else 1), bias=bias)
        self.dense_4h_to_h = nn.Linear(width, config.hidden_size, bias=bias and part.index == 0)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dense_h_to_4h(x)
        if self.is_gated:
            up, gate = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        hidden: Tensor = self.dense_4h_to_h(inner)
        return hidden


class NeoxLayer(nn.Module):
    """[batch, length, hidden_size] -> the same; `cos`, `sin` are of the tokens' positions, `view` says the rest.

    Attention and MLP follow each other, or read the same hidden state; then one norm may serve both (`gpt_j_tied`).
    Hidden states are dropped before the parts' results are added up: all parts drop the same.
    """

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        options = config.options
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = make_norm(options.norm, config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = (
            None if options.gpt_j_tied else make_norm(options.norm, config.hidden_size, config.norm_eps)
        )
        self.attention = NeoxAttention(config, part)
        self.mlp = NeoxMLP(config, part)
        self.dropout = options.hidden_dropout
        self.enter: nn.Module = nn.Identity()
        self.leave: nn.Module = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: LayerView, cache: KVCache | None = None) -> Tensor:
        y = self.enter(x)
        normed = self.input_layernorm(y)
        added: Tensor = self.attention(normed, cos, sin, view, cache)
        added = drop_hidden(added, view.keys, ATTENTION_OUTPUT, self.dropout)
        if not self.parallel_residual:
            x = x + self.leave(added)
            y = self.enter(x)
        mlp: Tensor = self.mlp(normed if self.post_attention_layernorm is None else self.post_attention_layernorm(y))
        mlp = drop_hidden(mlp, view.keys, MLP_OUTPUT, self.dropout)
        mixed: Tensor = x + self.leave(added + mlp if self.parallel_residual else mlp)
        return mixed


class NeoxHead(nn.Module):
    """The final norm, and the projection to the vocabulary (without bias)."""

    def __init__(self, config: ModelConfig, part: Part = WHOLE) -> None:
        super().__init__()
        self.final_layer_norm = make_norm(config.options.norm, config.hidden_size, config.norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, part.share(config.vocab_size), bias=False)
        self.enter: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.final_layer_norm(self.enter(x))
        return normed


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Read the kit's own config.json of this family; UserError for settings that the network does not have."""
    options = read_options(raw)
    activation, known = raw.get("hidden_act", "gelu"), sorted({*ACTIVATIONS, "softsign", *GATES})
    if activation not in known:
        raise UserError(f"config.json: hidden_act is {activation!r}, expected one of {', '.join(known)}")
    hidden_size, num_heads = get_positive_int(raw, "hidden_size"), get_positive_int(raw, "num_attention_heads")
    rotary = options.pos_emb == "rotary"
    if options.pos_emb == "sinusoidal" and hidden_size % 2:
        raise UserError(f"config.json: sinusoidal positions need an even hidden_size, it is {hidden_size}")
    output_method = raw.get("output_initializer")
    return ModelConfig(
        family="neox",
        vocab_size=get_positive_int(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=get_positive_int(raw, "num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=get_positive_int(raw, "intermediate_size"),
        max_position_embeddings=get_positive_int(raw, "max_position_embeddings"),
        rotary_dim=int(hidden_size // num_heads * get_number(raw, "rotary_pct", 1.0)) if rotary else 0,
        rotary_base=get_number(raw, "rotary_emb_base", 10000.0),
        activation=activation,
        norm_eps=get_number(raw, "norm_eps", 1e-5),
        parallel_residual=get_truth(raw, "use_parallel_residual", False),
        attention_bias=get_truth(raw, "attention_bias", True),
        tie_embeddings=get_truth(raw, "tie_word_embeddings", True),
        init_std=get_number(raw, "initializer_range", 0.02),
        output_init_std=get_number(raw, _OUTPUT_SPREAD, 0.0) if raw.get(_OUTPUT_SPREAD) is not None else None,
        init_method=check_method(raw.get("initializer", "normal")),
        output_init_method=None if output_method is None else check_method(output_method),
        options=options,
    )


def list_choices(config: ModelConfig) -> list[str]:
    """Return what of a model's config is beyond the family `gpt_neox`, as `name value`."""
    said = config.options.to_json() | {"hidden_act": config.activation}
    usual = NeoxOptions().to_json() | {"hidden_act": config.activation if config.activation in ACTIVATIONS else None}
    return [f"{name} {value}" for name, value in said.items() if value != usual[name]]


def cuts(config: ModelConfig) -> dict[str, Cut]:
    """Return how each parameter that a model may have is spread over parts."""
    grouped = StackedRows((config.num_heads // config.num_key_heads, 1, 1))
    qkv: Cut = "rows" if config.num_key_heads == config.num_heads else grouped
    inner: Cut = StackedRows((1, 1)) if config.activation in GATES else "rows"
    norms = ("input_layernorm", "post_attention_layernorm", "final_layer_norm")
    return {
        "embed_in.weight": "rows",
        "position_embeddings.weight": "once",
        **{f"{norm}.{name}": "whole" for norm in norms for name in ("weight", "bias", "scale", "g")},
        "attention.query_key_value.weight": qkv,
        "attention.query_key_value.bias": qkv,
        "attention.qk_layernorm.scale": "rows",
        "attention.qk_layernorm.weight": "rows",
        "attention.qk_layernorm.bias": "rows",
        "attention.qk_layernorm.g": "whole",
        "attention.rpe.weight": "columns",
        "attention.dense.weight": "columns",
        "attention.dense.bias": "once",
        "mlp.dense_h_to_4h.weight": inner,
        "mlp.dense_h_to_4h.bias": inner,
        "mlp.dense_4h_to_h.weight": "columns",
        "mlp.dense_4h_to_h.bias": "once",
        "embed_out.weight": "rows",
    }


FAMILY = Family(
    name="neox",
    config_from_hf=config_from_hf,
    embed=NeoxEmbed,
    layer=NeoxLayer,
    head=NeoxHead,
    cuts=cuts,
    norm="final_layer_norm",
    projection="embed_out",
    embedding="embed_in",
    body_prefix="gpt_neox.",
    layers_prefix="gpt_neox.layers.",
    projection_aliases=(),
    ignored=re.compile("(?!)"),
    takes_views=True,
    of_all_layers=("attention.rpe.weight",),
)
