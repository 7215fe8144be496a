"""Position encodings beside the rotary one: learned and sinusoidal tables, T5's relative biases, ALiBi's slopes.

Tables are added to the embedding. Biases are added to the scores of attention, one a head; they depend on how far
behind a token another is, so documents that share a row need nothing of their own.
"""

import functools
import math

import torch
from torch import Tensor, nn


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


class RelativeBias(nn.Module):
    """A bias by head and bucket of distance, `weight` [buckets, heads], for each pair of tokens.

    All layers of a model have the same weight, each as a parameter of its own. `factor` multiplies it: GPT-NeoX's is
    sqrt(head_dim) since January 2022, and was 1 before.
    """

    def __init__(self, buckets: int, heads: int, *, max_distance: int, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.max_distance, self.factor = max_distance, factor

    def forward(self, distances: Tensor) -> Tensor:
        """Return the biases [1, heads, length, all], float32, of int64 distances [length, all]."""
        buckets = torch.tensor(bucket_distances(self.weight.shape[0], self.max_distance), device=distances.device)
        # Rows by distance first: the gradient of each is a sum over a diagonal.
        rows = self.weight.float()[buckets] * self.factor
        return rows.T[:, distances.clamp(max=self.max_distance)].unsqueeze(0)
