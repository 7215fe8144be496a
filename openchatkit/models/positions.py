"""Position encodings beside the rotary one: learned and sinusoidal tables, T5's relative biases, ALiBi's slopes.

Tables are added to the embedding. Biases are added to the scores of attention, one a head; they depend on how far
behind a token another is, so documents that share a row need nothing of their own.
"""

import functools
import math

import torch
from torch import Tensor, nn

from openchatkit.libraries import pytorch


def measure_distances(length: int, *, before: int = 0, device: torch.device) -> Tensor:
    """Return how far behind each of `length` tokens all others are, and 0 for later ones.

    int64 [length, before + length], of tokens that follow `before` others.
    """
    place = torch.arange(before + length, device=device)
    return (place[before:].unsqueeze(-1) - place).clamp(min=0)


def alibi_slopes(heads: int) -> Tensor:
    """Return each head's slope, float64 [heads] on the CPU (Press et al., arXiv 2108.12409, section 3).

    Where `heads` is no power of two, the slopes of the next lower one come first, then every second one of the next
    higher one.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * k / lower) for k in range(1, lower + 1)]
    between = [2.0 ** (-8 * k / (2 * lower)) for k in range(1, 2 * lower, 2)]
    return torch.tensor([*slopes, *between][:heads], dtype=torch.float64, device="cpu")


def alibi_bias(slopes: Tensor, distances: Tensor) -> Tensor:
    """Return the biases [1, heads, length, all], float32, of slopes [heads] and distances [length, all]."""
    slopes = slopes.to(distances.device, torch.float32)
    return -slopes.view(1, -1, 1, 1) * distances


class SinusoidalTable(nn.Module):
    """Rows of sines, then cosines (not in turn), of position x inverse frequency; float32, grown as positions grow.

    Inverse frequency i of half of the width is 10000^(-2i / width) (Vaswani et al., arXiv 1706.03762, section 3.5). As
    of a `RotaryTable`, the CPU computes it for every device.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._table: Tensor | None = None

    def forward(self, positions: Tensor, length: int) -> Tensor:
        """Return the rows of positions [...] below `length`: [..., width]."""
        table = self._table
        if table is None or table.shape[0] < length or table.device != positions.device:
            exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device="cpu") / self.width
            angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), 10000.0**-exponent)
            table = self._table = torch.cat([angles.sin(), angles.cos()], dim=-1).to(positions.device)
        return table[positions]


@functools.cache
def bucket_distances(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return the buckets of the distances 0 to `max_distance`; all that are farther are in the last one.

    The lower half has one distance each, the others grow by a factor (Raffel et al., arXiv 1910.10683, section 2.1).
    """
    exact = buckets // 2
    found = list(range(min(exact, max_distance + 1)))
    for distance in range(exact, max_distance + 1):
        share = math.log(distance / exact) / math.log(max_distance / exact)
        found.append(min(exact + int(share * (buckets - exact)), buckets - 1))
    return tuple(found)


def list_buckets(length: int, reach: int, *, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Return the buckets of the diagonals of pairs of tokens [length, reach]: int64 [length + reach].

    Diagonal j has the pairs in which the key is reach - 1 - j places before the query, or after it, as if in its place.
    """
    found = bucket_distances(buckets, max_distance)
    distances = (reach - 1 - torch.arange(length + reach, device="cpu")).clamp(0, max_distance)
    return pytorch.send(torch.tensor(found, device="cpu")[distances], device)


def spread_diagonals(values: Tensor, length: int) -> Tensor:
    """Return [heads, length, reach] of which each diagonal has one of `values` [heads, length + reach].

    Entry q, k is value k - q + length - 1. Views and one copy make it, and of a gradient sums over rows.
    """
    width = values.shape[-1]
    rows = values.unsqueeze(1).expand(-1, length, -1).reshape(len(values), length * width)
    # Rows that are one shorter begin one value earlier, each in turn.
    shifted = rows[:, length - 1 : length - 1 + length * (width - 1)].view(len(values), length, width - 1)
    return shifted[..., : width - length]


class RelativeBias(nn.Module):
    """A bias by head and bucket of distance, `weight` [buckets, heads], for each pair of tokens.

    All layers of a model have the same weight, each as a parameter of its own. `factor` multiplies it: GPT-NeoX's is
    sqrt(head_dim) since January 2022, and was 1 before.
    """

    def __init__(self, buckets: int, heads: int, *, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.factor = factor

    def forward(self, buckets: Tensor, length: int) -> Tensor:
        """Return the biases [1, heads, length, reach], in float32 at least, of the buckets of `list_buckets`."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        return spread_diagonals(weight.T[:, buckets] * self.factor, length).unsqueeze(0)
