"""Pieces that families share: embedding, activations, rotary tables, rotation, attention."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openchatkit.models.config import ACTIVATION_FORMULAS, ModelConfig
from openchatkit.models.cuts import Part
from openchatkit.models.documents import Borders, Seen, attend_documents

_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "erf_gelu": F.gelu,
    "tanh_gelu": functools.partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "relu": F.relu,
    "silu": F.silu,
}
ACTIVATIONS = {name: _FORMULAS[formula] for name, formula in ACTIVATION_FORMULAS.items()}


class VocabularyRows(nn.Embedding):
    """A part's rows of the embedding, and zeros for the tokens of other parts: the parts' results add up."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        super().__init__(part.share(config.vocab_size), config.hidden_size)
        self.first, self.is_whole = part.first(config.vocab_size), part.count == 1

    def forward(self, tokens: Tensor) -> Tensor:
        if self.is_whole:
            return super().forward(tokens)
        rows = tokens - self.first
        others = (rows < 0) | (rows >= self.num_embeddings)
        return super().forward(rows.masked_fill(others, 0)).masked_fill(others.unsqueeze(-1), 0.0)


class RotaryTable(nn.Module):
    """Table of cos and sin of position x inverse frequency, in float32, grown to the longest sequence seen.

    Inverse frequency j is base^(-2j / rotary_dim) (Su et al., RoFormer, arXiv 2104.09864, section 3.4). The CPU
    computes the table for every device: powers, sines and cosines differ in the last bit from processor to processor.
    """

    def __init__(self, rotary_dim: int, base: float) -> None:
        super().__init__()
        self.rotary_dim, self.base = rotary_dim, base
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [length, rotary_dim / 2]."""
        table = self._table
        if table is None or table[0].shape[0] < length or table[0].device != device:
            exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
            angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), self.base**-exponent)
            table = self._table = (angles.cos().to(device), angles.sin().to(device))
        return table[0][:length], table[1][:length]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, length, head_dim] as GPT-NeoX does: dimension j pairs with j + rotary_dim / 2.

    cos and sin are [length, rotary_dim / 2], or with positions that differ from row to row [batch, 1, length, ...].
    """
    half = cos.shape[-1]
    # One split, not three slices: the backward of a slice fills a whole tensor with zeros.
    left, right, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (left * cos - right * sin, right * cos + left * sin)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, length, head_dim] as GPT-J does: dimension 2j pairs with 2j + 1; see `rotate_halves`."""
    rotary_dim = 2 * cos.shape[-1]
    turning, rest = torch.split(x, [rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    even, odd = torch.unflatten(turning, -1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, seen: Seen | None = None) -> Tensor:
    """Attend over [batch, heads, length, head_dim]; returns [batch, length, heads * head_dim].

    Without `seen` (see `documents`) a token sees itself and all before it; a single query may follow earlier keys.
    """
    if isinstance(seen, Borders):
        return attend_documents(query, key, value, seen)
    if seen is None and query.shape[2] == key.shape[2]:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        assert seen is not None or query.shape[2] == 1, f"{query.shape[2]} tokens after others need a mask"
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return mixed.transpose(1, 2).flatten(-2)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, seen: Seen | None = None) -> Tensor:
    """Attend as `causal_attention` does, with fewer heads of keys and values, each for as many heads of queries.

    Kernels that take grouped keys themselves are missing on CPUs, and for masks.
    """
    batch, key_heads, _, width = key.shape
    times = query.shape[1] // key_heads
    if query.shape[2] == 1 and seen is None:
        # A decoded token's queries are so many queries of one head: keys of the whole text are not copied.
        mixed = F.scaled_dot_product_attention(query.reshape(batch, key_heads, times, width), key, value)
        return mixed.reshape(batch, 1, -1)
    key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
    return causal_attention(query, key, value, seen)
