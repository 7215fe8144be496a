"""How each parameter is cut into the parts of tensor parallelism, and put together again. Knows no ranks.

A part has whole attention heads, a run of the MLP's inner dimensions and a run of the vocabulary's rows. The first
matrix of attention and MLP is cut by its outputs and the second by its inputs, so that the parts' results add up to
those of the whole layer (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.models.config import ModelConfig


@dataclass(frozen=True)
class StackedRows:
    """The cut of a parameter that is several, one above the other, each of which is cut by rows.

    `shares` are their numbers of rows, divided by what all have in common.
    """

    shares: tuple[int, ...]

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """Return views of those that a parameter, or a part's piece of it, is made of."""
        unit, rest = divmod(stacked.shape[0], sum(self.shares))
        assert rest == 0, f"{stacked.shape[0]} rows in shares of {self.shares}"
        return torch.split(stacked, [unit * share for share in self.shares])


Cut = Literal["rows", "columns", "whole", "once"] | StackedRows
"""How a parameter is spread over parts.

"rows" and "columns": along dimension 0 or 1. "whole": every part has all of it, and in each its gradient is a share,
to be summed over the parts. "once": only part 0 has it, such as the bias of a projection whose outputs are summed.
"""


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of every layer, by its number from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, f"part {self.index} of {self.count}"

    def share(self, size: int) -> int:
        """Return how many of `size` rows, columns or heads a part has; see `check_parts` for what divides."""
        assert size % self.count == 0, f"{size} in {self.count} parts"
        return size // self.count

    def first(self, size: int) -> int:
        """Return the first of this part's rows, columns or heads, out of `size`."""
        return self.index * self.share(size)


WHOLE = Part(0, 1)


def check_parts(config: ModelConfig, count: int, *, flag: str = "--tensor-group-size") -> None:
    """UserError unless the model can be cut into `count` parts, the number that `flag` gave."""
    sizes = {
        "attention heads": config.num_heads,
        **({"key heads": config.num_key_heads} if config.num_key_heads != config.num_heads else {}),
        "intermediate size": config.intermediate_size,
        "vocabulary rows": config.vocab_size,
    }
    if count < 1 or any(size % count for size in sizes.values()):
        common = math.gcd(*sizes.values())
        fitting = [str(number) for number in range(1, common + 1) if common % number == 0]
        has = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"{flag} {count}: expected a number that divides all of the model's sizes ({has}); "
            f"give {' or '.join(fitting)}"
        )
    norm = config.options.norm
    if count > 1 and config.options.use_qk_layernorm and norm in ("layernorm", "non_parametric_layernorm"):
        raise UserError(
            f"{flag} {count}: use_qk_layernorm with {norm} is over all heads, of which a rank would have "
            "some: use 1, or rmsnorm"
        )


def is_cut(cut: Cut) -> bool:
    """Whether each part has a piece of a parameter."""
    return cut not in ("whole", "once")


def whole_shape(shape: Sequence[int], cut: Cut, count: int) -> tuple[int, ...]:
    """Return the shape of the parameter of which each of `count` parts has a piece of `shape`."""
    return tuple(size * count if number == _dimension(cut) else size for number, size in enumerate(shape))


def cut_tensor(whole: Tensor, cut: Cut, part: Part) -> Tensor:
    """Return a part's piece of a parameter as a copy of its own; the parameter itself where that is not cut."""
    dimension = _dimension(cut)
    if dimension is None or part.count == 1:
        return whole
    if isinstance(cut, StackedRows):
        return torch.cat([cut_tensor(each, "rows", part) for each in cut.split(whole)])
    size = whole.shape[dimension]
    piece = whole.narrow(dimension, part.first(size), part.share(size))
    # Not a view, which would keep the whole tensor in memory.
    return piece.clone(memory_format=torch.contiguous_format)


def join_tensor(pieces: Sequence[Tensor], cut: Cut) -> Tensor:
    """Invert `cut_tensor`, given the pieces in the order of parts; of what is not cut, the first is the parameter."""
    dimension = _dimension(cut)
    if dimension is None or len(pieces) == 1:
        return pieces[0]
    if isinstance(cut, StackedRows):
        return torch.cat([torch.cat(each) for each in zip(*map(cut.split, pieces), strict=True)])
    return torch.cat(list(pieces), dimension)


def _dimension(cut: Cut) -> int | None:
    """Return the dimension along which a parameter is cut, None where it is not."""
    return (1 if cut == "columns" else 0) if is_cut(cut) else None


def is_in(part: Part, cut: Cut) -> bool:
    """Whether a part has anything of a parameter."""
    return cut != "once" or part.index == 0


def cut_shard(tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut], part: Part) -> dict[str, Tensor]:
    """Return what a part has of a shard's stored tensors: those that `Stage.load` takes."""
    return {name: cut_tensor(whole, cuts[name], part) for name, whole in tensors.items() if is_in(part, cuts[name])}


def join_shard(parts: Sequence[Mapping[str, Tensor]], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Invert `cut_shard`, given all parts in their order."""
    return {
        name: join_tensor([part[name] for part in parts if name in part], cuts[name])
        for name in parts[0]  # which has all of them
    }
