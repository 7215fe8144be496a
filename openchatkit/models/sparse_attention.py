"""Sparse attention by blocks of tokens: which blocks the blocks of a row see, by kind, as GPT-NeoX's layouts have it.

A layout is bool [heads or 1, blocks, blocks]: row r of it is true at the columns c <= r that block r sees. Within a
block, and on the diagonal, a token sees itself and those before it. Layouts are made for a model's longest row; shorter
ones have the first blocks of it, so that a row sees the same while it grows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.models.dropout import mix
from openchatkit.models.sparsity import SPARSE_KINDS, Sparsity

_LAST = 2**63 - 1


def make_layout(kind: str, sparsity: Sparsity, *, blocks: int, heads: int, layer: int) -> Tensor:
    """Return the layout of a layer, bool [heads, blocks, blocks] where each head has its own, else [1, ...]."""
    sparsity.check(kind)
    layouts = []
    for head in range(heads if sparsity.different_layout_per_head else 1):
        row = torch.arange(blocks, device="cpu").unsqueeze(1)
        layouts.append(_SEEN[kind](sparsity, row, row.T, head, layer) & (row >= row.T))
    return torch.stack(layouts)


def block_mask(layout: Tensor, block: int, length: int, *, before: int = 0, device: torch.device) -> Tensor:
    """Return bool [heads or 1, length, before + length]: the tokens in blocks that each token's block sees, none later.

    Of `length` tokens that follow `before` others.
    """
    place = torch.arange(before + length, device=device)
    needed, made = -(-len(place) // block), layout.shape[-1]
    assert needed <= made, f"{len(place)} tokens are {needed} blocks of {block}, the layout has {made}"
    layout = layout[:, :needed, :needed].to(device)
    seen = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return seen[:, before : len(place), : len(place)] & (place <= place[before:].unsqueeze(-1))


def check_rows(sparsity: Sparsity, length: int) -> None:
    """UserError unless rows of `length` tokens are whole blocks."""
    if length % sparsity.block:
        fits = length // sparsity.block * sparsity.block or sparsity.block
        raise UserError(
            f"--seq-length {length}: blocks of the model's sparse attention have {sparsity.block} tokens; "
            f"use {fits}, or change block in sparsity_config"
        )


def _see_local(settings: Sparsity, row: Tensor, column: Tensor, head: int, layer: int) -> Tensor:
    """A window that ends at the row's own block (`local`)."""
    width = settings.num_local_blocks or settings.num_sliding_window_blocks or 4
    return column >= row - width // 2


def _see_fixed(settings: Sparsity, row: Tensor, column: Tensor, head: int, layer: int) -> Tensor:
    """The row's window, and the global blocks of windows before (Child et al., arXiv 1904.10509, section 4.3)."""
    width, globals_, blocks = settings.num_local_blocks or 4, settings.num_global_blocks, len(row)
    offset = width - (1 + head % settings.num_different_global_patterns) * globals_
    place, whole = column % width, blocks // width * width
    is_global = (column < whole) & (place >= offset) & (place < offset + globals_)
    if whole < blocks:  # a last window that is shorter, whose global blocks may begin before it
        start = min(whole + offset, blocks - globals_)
        is_global |= (column >= start) & (column < start + globals_)
    return (row // width == column // width) | is_global


def _see_variable(settings: Sparsity, row: Tensor, column: Tensor, head: int, layer: int) -> Tensor:
    """The row's window, of listed widths and then the last one, global and random blocks."""
    blocks, windows = len(row), list(settings.local_window_blocks)
    while sum(windows) < blocks:
        windows.append(windows[-1])
    window = torch.arange(len(windows), device="cpu").repeat_interleave(torch.tensor(windows, device="cpu"))[:blocks]
    same = window.unsqueeze(1) == window
    drawn = _draw_blocks(settings, settings.count_random_blocks("sparse_variable"), row, head, layer)
    return same | _is_global(settings, column) | drawn


def _see_bigbird(settings: Sparsity, row: Tensor, column: Tensor, head: int, layer: int) -> Tensor:
    """A window, the first blocks, and random ones (Zaheer et al., arXiv 2007.14062, section 2)."""
    width, first = settings.num_sliding_window_blocks or 3, settings.num_global_blocks
    count = settings.count_random_blocks("bigbird")
    seen = (column >= row - width // 2) | (column < first) | (row < first)
    return seen | _draw_blocks(settings, count, row, head, layer)


def _see_longformer(settings: Sparsity, row: Tensor, column: Tensor, head: int, layer: int) -> Tensor:
    """A window, and blocks that see all and are seen by all (Beltagy et al., arXiv 2004.05150, section 3.1)."""
    width = settings.num_sliding_window_blocks or 3
    return (column >= row - width // 2) | _is_global(settings, column) | _is_global(settings, row)


_SEEN: dict[str, Callable[[Sparsity, Tensor, Tensor, int, int], Tensor]] = dict(
    zip(SPARSE_KINDS, (_see_local, _see_fixed, _see_variable, _see_bigbird, _see_longformer), strict=True)
)


def _is_global(settings: Sparsity, number: Tensor) -> Tensor:
    """Whether blocks are of those that `global_block_indices` lists, or of the ranges that begin there."""
    starts = settings.global_block_indices
    ends = settings.global_block_end_indices or [start + 1 for start in starts]
    found = torch.zeros_like(number, dtype=torch.bool)
    for start, end in zip(starts, ends, strict=True):
        found |= (number >= start) & (number < end)
    return found


def _draw_blocks(settings: Sparsity, count: int, row: Tensor, head: int, layer: int) -> Tensor:
    """Draw `count` of each row's blocks up to its own, or all where there are fewer: by seed, layer, head and row."""
    blocks = len(row)
    drawn = torch.zeros(blocks, blocks, dtype=torch.bool, device="cpu")
    if not count:
        return drawn
    key = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    for number in (settings.seed, layer, head, row, row.T):
        key = mix(key, number)
    numbers = key.masked_fill(row < row.T, _LAST)
    return drawn.scatter_(1, numbers.argsort(1)[:, :count], True)
