"""Dropout as a function of seed, sample, layer, place and element: any layout, recomputation and resume repeat it.

A row has a key of 64 bits, by the seed and its sample's number, which no two steps share; of it come the keys of its
layers, of what is dropped there, of its tokens and heads. The last one is mixed with the number of the element. Keys
are mixed as by Steele et al., "Fast splittable pseudorandom number generators" (2014), elements as by Wellons, "Hash
function prospector" (2018). No part of it knows how rows, tokens, heads and layers are spread.
"""

import torch
from torch import Tensor

# What is dropped in a layer; the embedding's sum is that of a layer of its own.
EMBEDDING, ATTENTION_WEIGHTS, ATTENTION_OUTPUT, MLP_OUTPUT = range(4)


def row_keys(seed: int, first: int, rows: int) -> Tensor:
    """Return the keys of samples `first`, `first` + 1, ... : int64 [rows], on the CPU."""
    samples = torch.arange(first, first + rows, dtype=torch.int64, device="cpu")
    return mix(mix(torch.zeros_like(samples), seed), samples)


def mix(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """Return new keys of keys and numbers, int64 tensors of one shape after broadcasting."""
    mixed = (keys ^ numbers) + _wrap(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shift(mixed, 30, 64)) * _wrap(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27, 64)) * _wrap(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31, 64)


def drop_hidden(hidden: Tensor, keys: Tensor | None, site: int, rate: float) -> Tensor:
    """Set a share `rate` of hidden states [batch, length, width] to 0 and scale the others, so that the mean stays.

    `keys` are those of a layer, int64 [batch]; without them nothing is dropped.
    """
    if keys is None or not rate:
        return hidden
    places = torch.arange(hidden.shape[1], device=hidden.device)
    of_tokens = mix(mix(keys, site).unsqueeze(-1), places)
    return _drop(hidden, of_tokens, rate)


def drop_weights(weights: Tensor, keys: Tensor | None, rate: float, *, first_head: int = 0) -> Tensor:
    """Drop attention's weights [batch, heads, queries, keys], of the heads from `first_head` on; see `drop_hidden`."""
    if keys is None or not rate:
        return weights
    heads = torch.arange(first_head, first_head + weights.shape[1], device=weights.device)
    of_heads = mix(mix(keys, ATTENTION_WEIGHTS).unsqueeze(-1), heads)
    places = torch.arange(weights.shape[2], device=weights.device)
    return _drop(weights, mix(of_heads.unsqueeze(-1), places), rate)


def attend_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, keys: Tensor, *, rate: float, first_head: int = 0
) -> Tensor:
    """Attend with dropped weights: [batch, heads, length, head_dim] -> [batch, length, heads * head_dim].

    `mask` is added to the scores; heads of keys and values may be fewer. By the plain formula, which holds a number for
    each pair of a row's tokens: fused kernels drop out by generators of their own, which know no samples and layouts.
    """
    times = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(times, dim=1) if times > 1 else each for each in (key, value))
    # Before the product, which float16 could not hold.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(value.dtype)
    mixed = drop_weights(weights, keys, rate, first_head=first_head) @ value
    return mixed.transpose(1, 2).flatten(-2)


def _drop(values: Tensor, keys: Tensor, rate: float) -> Tensor:
    """Drop of values [..., elements], with a key for each [...]."""
    dropped = uniform(keys, values.shape[-1]) < round(rate * 2**32) - 2**31
    return values.masked_fill(dropped, 0.0) * (1 / (1 - rate))


def uniform(keys: Tensor, elements: int) -> Tensor:
    """Return int32 numbers [..., elements], all equally likely, of int64 keys [...]."""
    low, high = (keys & 0xFFFFFFFF) - 2**31, keys >> 32
    mixed = _mix_elements(torch.arange(elements, dtype=torch.int32, device=keys.device))
    mixed = _mix_elements(mixed ^ low.int().unsqueeze(-1))
    return mixed ^ high.int().unsqueeze(-1)


def _mix_elements(numbers: Tensor) -> Tensor:
    """Permute int32 numbers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = (numbers ^ _shift(numbers, shift, 32)) * _wrap(factor, 32)
    return numbers ^ _shift(numbers, 16, 32)


def _shift(numbers: Tensor, places: int, bits: int) -> Tensor:
    """Shift integers to the right, zeros coming in: torch's own shift keeps the sign."""
    return (numbers >> places) & ((1 << (bits - places)) - 1)


def _wrap(number: int, bits: int = 64) -> int:
    """Return the signed integer of the same bits."""
    return number - (1 << bits) if number >> (bits - 1) else number
