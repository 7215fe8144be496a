"""GPT-NeoX's forward pass for one text on the CPU, in few operators.

Owns how it is computed, not the result: transformers' own forward is the tests' oracle, and still runs for anything but
the next tokens of one text over a `GrowingCache`. At one token a pass, starting a small operator takes as long as
computing it, so rotary positions are applied to queries and keys together, from a table that is made once, and modules
are looked up once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from openchatkit.inference.engine.attention import attention
from openchatkit.inference.engine.kv_cache import GrowingCache, GrowingLayer
from openchatkit.libraries import hf_transformers

# Positions that the rotary table is first made for; it doubles as texts grow.
_FEWEST = 256

_Map = Callable[[Tensor], Tensor]  # [tokens, width] -> [tokens, another width]


def use(model: PreTrainedModel) -> bool:
    """Let this module run a GPT-NeoX whose parts are known; return whether it does.

    Call it when linear layers have been replaced and packed: it does not see those that are replaced later.
    """
    name = hf_transformers.cache_argument(model)
    if model.config.model_type != "gpt_neox" or name is None or not _positions_are_plain(model):
        return False
    try:
        step = _Step(model)
    except AttributeError:  # a release of transformers with other names for the parts
        return False
    original, known = model.forward, {"input_ids", "use_cache", "logits_to_keep", name}

    @functools.wraps(original)
    def forward(*args: Any, **options: Any) -> Any:
        cache, ids = options.get(name), options.get("input_ids")
        one_text = isinstance(cache, GrowingCache) and ids is not None and len(ids) == 1
        if args or options.keys() - known or not one_text or model.training:
            return original(*args, **options)
        return SimpleNamespace(logits=step(options["input_ids"][0], options[name], options.get("logits_to_keep", 0)))

    model.forward = forward
    return True


class Rotary:
    """cos and sin of the positions from start to end, float32 [tokens, 1, 1, rotated], sin's first half negated."""

    def __init__(self, embedding: nn.Module) -> None:
        self._embedding = embedding
        self._length = 0

    def __call__(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        if end > self._length:
            self._length = max(2 * end, _FEWEST)
            positions = torch.arange(self._length)[None]
            cos, sin = (table.view(self._length, 1, 1, -1) for table in self._embedding(torch.empty(0), positions))
            first, second = sin.chunk(2, dim=-1)
            self._cos, self._sin = cos, torch.cat((-first, second), dim=-1)
        return self._cos[start:end], self._sin[start:end]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's parts. Attribute look-ups of modules are slow: 260 a token took as long as computing the norms."""

    attention: nn.Module
    scale: float
    norms: tuple[_Map, _Map]
    query_key_value: _Map
    dense: _Map
    widen: _Map
    act: _Map
    narrow: _Map

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attend, mlp = layer.attention, layer.mlp
        return cls(
            attention=attend,
            scale=attend.scaling,
            norms=(_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)),
            query_key_value=attend.query_key_value.forward,
            dense=attend.dense.forward,
            widen=mlp.dense_h_to_4h.forward,
            act=mlp.act.forward,
            narrow=mlp.dense_4h_to_h.forward,
        )

    def mlp(self, x: Tensor) -> Tensor:
        return self.narrow(self.act(self.widen(self.norms[1](x))))


class _Step:
    """The next tokens of a text through the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        body: Any = model.gpt_neox
        self._embed = body.embed_in.forward
        self._layers = [_Layer.of(layer) for layer in body.layers]
        self._norm = _norm(body.final_layer_norm)
        self._head = model.get_output_embeddings().forward
        self._rotary = Rotary(body.rotary_emb)
        self._heads = model.config.num_attention_heads
        self._parallel = model.config.use_parallel_residual

    def __call__(self, ids: Tensor, cache: GrowingCache, keep: int) -> Tensor:
        """Logits [1, keep, vocabulary] after the last `keep` of `ids` [tokens]; after all of them where it is 0."""
        start = cache.get_seq_length()
        cos, sin = self._rotary(start, start + len(ids))
        x = self._embed(ids)  # [tokens, width]
        for layer, held in zip(self._layers, cast(list[GrowingLayer], cache.layers), strict=True):
            attended = self._attend(layer, layer.norms[0](x), held, cos, sin)
            if self._parallel:
                x = layer.mlp(x).add_(attended).add_(x)
            else:
                x = attended.add_(x)
                x = layer.mlp(x).add_(x)
        return self._head(self._norm(x[-keep:]))[None]

    def _attend(self, layer: _Layer, x: Tensor, held: GrowingLayer, cos: Tensor, sin: Tensor) -> Tensor:
        """Self-attention of x [tokens, width] over x and the tokens in `held`."""
        qkv = layer.query_key_value(x).view(len(x), self._heads, 3, -1).float()
        rotated = qkv[..., :2, : cos.shape[-1]]  # of queries and keys, [tokens, heads, 2, rotated]
        first, second = rotated.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        rotated.copy_(swapped.mul_(sin).addcmul_(rotated, cos))
        query, key, value = qkv.permute(2, 1, 0, 3).unsqueeze(1)  # each [1, heads, tokens, size]
        keys, values = held.update(key, value)
        output, _ = attention(layer.attention, query, keys, values, None, scaling=layer.scale)
        return layer.dense(output.view(x.shape).to(x.dtype))


def _norm(layer: nn.LayerNorm) -> _Map:
    shape, weight, bias, eps = list(layer.normalized_shape), layer.weight, layer.bias, layer.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _positions_are_plain(model: PreTrainedModel) -> bool:
    """Whether the rotary angles of a position do not depend on the length of the text."""
    return (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") in ("default", "linear")
