"""GPT-NeoX's order of a run's samples: each source's own, and the turns of several.

It is the order of all samples that a run takes, so it is another one where the run is to take so many more that
documents are gone through once more often. Owns no rows: `data.samples.neox_packing` makes them.
"""

import math
from collections.abc import Sequence

import numpy as np

from openchatkit.data.blending import blend
from openchatkit.data.mixture import STRIDE, Interleaving, count_turns
from openchatkit.data.options import DataOptions
from openchatkit.data.samples.arrays import Arrays
from openchatkit.data.samples.neox_packing import NeoxPacked, pack_as_neox
from openchatkit.data.samples.order import digest
from openchatkit.data.samples.source import MixtureSource
from openchatkit.errors import UserError

_MORE = 1.005  # of its share is what a source of several has, so that turns never want more than there are


def arrange(
    sources: Sequence[MixtureSource], options: DataOptions, *, padding: int, weighted: bool
) -> tuple[list[NeoxPacked], Interleaving, int]:
    """Return the samples of each source, their turns, and after how many samples all begins again.

    That is after the last whole step of one pass, or of as many as the run takes. `weighted`: the sources have weights,
    as GPT-NeoX's lists of stores have, and its single store has not. UserError: fewer rows than a step takes.
    """
    weights = [source.weight for source in sources]
    packed = [
        pack_as_neox(
            source,
            options.seq_length,
            packing=options.packing,
            wanted=_take_share(options.wanted, weights, number) if weighted or len(sources) > 1 else options.wanted,
            padding=padding,
            allow_chopped=options.allow_chopped,
        )
        for number, source in enumerate(sources)
    ]
    length = sum(part.length for part in packed)
    if length + len(packed) < options.rows:
        raise UserError(
            f"{', '.join(source.name for source in sources)}: {length + len(packed)} rows of {options.seq_length} "
            f"tokens are fewer than the {options.rows} of a step: add data, or give smaller batches"
        )
    # GPT-NeoX counts one sample less than a source has; where that makes the only step incomplete, it is taken.
    cycle = max(length // options.rows, 1) * options.rows
    return packed, _take_turns(weights, min(cycle, options.wanted or cycle), options), cycle


def _take_share(wanted: int | None, weights: Sequence[float], number: int) -> int | None:
    """Return how many samples of a source are wanted where `wanted` of all are."""
    return None if wanted is None else math.ceil(wanted * (weights[number] / sum(weights)) * _MORE)


def _take_turns(weights: Sequence[float], length: int, options: DataOptions) -> Interleaving:
    """Return GPT-NeoX's turns of the first `length` samples, which begin again after them."""
    count = len(weights)
    if count == 1:
        before = np.arange(0, length, STRIDE)[:, None]
        return Interleaving(np.broadcast_to(np.uint8(0), length), before, begins_again=True)
    name = digest(["blending", *map(repr, weights)])
    arrays = Arrays(options.data_cache / "orders" / name, 0)
    turns = arrays.make(f"turns-{length}", None, length, np.min_scalar_type(count - 1), blend(weights, length))
    pieces = (piece.ravel() for piece in count_turns(turns, count))
    groups = -(-length // STRIDE)
    before = arrays.make(f"turns-{length}-before", None, count * groups, np.dtype(np.int64), pieces)
    return Interleaving(turns, before.reshape(-1, count), begins_again=True)
