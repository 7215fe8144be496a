"""Attention for one text on the CPU, registered for transformers' models through their official interfaces.

Owns how it is computed there, not the result: that is transformers' `sdpa` and `eager` attention, which the tests
compare it with. Nothing here keeps a mask for the whole square of queries and keys: one query needs none, and several
queries after a text that was read before take it in blocks.

torch's CPU kernel is slow for a single query in bfloat16, so keys and values are best kept in float32
(`CACHE_DTYPE`), whatever the model computes in; the products are then computed in float32 too.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from openchatkit.libraries import hf_transformers

NAME = "openchatkit_cpu"
CACHE_DTYPE = torch.float32
# Families whose attention is plain: a scale, a causal mask, perhaps fewer heads of keys than of queries.
_PLAIN = ("gpt_neox", "llama", "gptj")
# Queries computed at once where they need a mask.
_BLOCK = 256


def use(model: PreTrainedModel) -> bool:
    """Let `model` attend by this module if its family is a known one; return whether it does."""
    if model.config.model_type == "gptj" and (modules := hf_transformers.gptj_attentions(model)):
        # They take no interface: each computes in a method, which gets the mask from the model.
        module: Any
        for module in modules:
            module._attn = functools.partial(_gptj_attention, float(module.scale_attn))
        return True
    if model.config.model_type in _PLAIN:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        return hf_transformers.attend_by(model, NAME)
    return False


def mask(*, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **options: Any) -> Tensor | None:
    """None for plain causal attention, where the last query is at the last key's position; else transformers' mask."""
    padding = options.get("attention_mask")
    plain = (
        options.get("mask_function", causal_mask_function) is causal_mask_function
        and (padding is None or bool(padding.all()))
        and kv_offset == 0
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_length
    )
    if plain:
        return None
    options["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **options)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' interface: query [batch, heads, queries, size], key and value [batch, fewer heads, keys, size].

    Without a mask the queries are at the last positions of the keys and see no later ones. Returns [batch, queries,
    heads, size] in the query's precision; it is computed in the key's.
    """
    dtype, query = query.dtype, query.to(key.dtype)
    if attention_mask is not None:
        attend = functools.partial(scaled_dot_product_attention, attn_mask=attention_mask, enable_gqa=True)
        output = attend(query, key, value, scale=scaling)
    elif query.shape[2] == 1:
        # The queries that share a head of keys can form one sequence, since all see every key.
        packed = query.reshape(*key.shape[:2], -1, query.shape[-1])
        output = scaled_dot_product_attention(packed, key, value, scale=scaling).reshape(query.shape)
    else:
        output = _causal(query, key, value, scaling)
    return output.to(dtype).transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    before = keys - queries
    if before == 0:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    blocks = []
    for start in range(0, queries, _BLOCK):
        end = min(start + _BLOCK, queries)
        seen = before + end
        allowed = torch.ones(end - start, seen, dtype=torch.bool).tril(diagonal=before + start)
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, :seen],
                value[:, :, :seen],
                attn_mask=allowed,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, dim=2)


def _gptj_attention(
    root: float, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """GPTJAttention._attn, where products are divided by `root`; the model masks every pass, padding included."""
    dtype, key, value = query.dtype, key.float(), value.float()
    bias = None if attention_mask is None else attention_mask.float()
    output = scaled_dot_product_attention(query.float(), key, value, attn_mask=bias, scale=1 / root)
    return output.to(dtype), None
