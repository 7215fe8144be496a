"""The order of documents and rows in an epoch, and the positions of tokens in that order.

An order is a pure function of (seed, source, epoch): it comes from a generator seeded with exactly these, and no state
is carried from one epoch to the next. Everything is computed a chunk at a time, so that memory does not grow with the
number of documents; `data.samples.arrays` keeps the results.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from openchatkit.data.samples.arrays import CHUNK, Arrays

_VERSION = 1  # of everything kept in files: raise it when any of it is computed in another way
_GROUP = 64  # sizes between two kept sums: an eighth of a byte for each
assert CHUNK % _GROUP == 0


def shuffle_numbers(arrays: Arrays, name: str, epoch: int, length: int, *, seed: Sequence[int]) -> np.ndarray:
    """Return the numbers below `length` in the epoch's order: uint32, or int64 where that is too small."""

    def shuffle(order: np.ndarray) -> None:
        # numpy promises that RandomState's streams never change, which it does not for its newer generators.
        np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).shuffle(order)

    dtype = number_type(length)
    numbers = (np.arange(low, high, dtype=dtype) for low, high in chunks(length))
    return arrays.make(name, epoch, length, dtype, numbers, shuffle)


def digest(key: Sequence[int | str]) -> str:
    """Return the name of the folder for the arrays of the source that `key` identifies."""
    return hashlib.sha256(json.dumps([_VERSION, *key]).encode()).hexdigest()[:32]


def number_type(length: int) -> np.dtype:
    """Return the type that numbers below `length` are kept in."""
    return np.dtype(np.uint32 if length < 1 << 32 else np.int64)


def chunks(length: int) -> Iterator[tuple[int, int]]:
    """Yield (first, one after the last) of successive chunks."""
    for low in range(0, length, CHUNK):
        yield low, min(low + CHUNK, length)


class RunningSums:
    """The positions of things of various sizes laid end to end, without a sum in memory for each of them.

    `sizes(low, high)` are the sizes of things number low to high - 1: int64. The sum before every 64th thing is kept;
    those between are added up on demand.
    """

    def __init__(
        self, arrays: Arrays, name: str, epoch: int | None, length: int, sizes: Callable[[int, int], np.ndarray]
    ) -> None:
        self._length = length
        self._sizes = sizes
        self._before = arrays.make(name, epoch, -(-length // _GROUP), np.dtype(np.int64), self._sums())

    def span(self, position: int, count: int) -> tuple[int, np.ndarray, int]:
        """Find the things that hold `count` places from `position` on, or as many as there are.

        Returns the first one's number, the sizes of it and all that follow, and how far into the first `position` is.
        """
        group = int(np.searchsorted(self._before, position, side="right")) - 1
        after = int(np.searchsorted(self._before, position + count, side="left"))
        low = group * _GROUP
        sizes = self._sizes(low, min(after * _GROUP, self._length))
        ends = np.cumsum(sizes) + self._before[group]
        first = int(np.searchsorted(ends, position, side="right"))
        last = int(np.searchsorted(ends, position + count, side="left"))
        return low + first, sizes[first : last + 1], position - int(ends[first] - sizes[first])

    def _sums(self) -> Iterator[np.ndarray]:
        total = 0
        for low, high in chunks(self._length):
            groups = np.add.reduceat(self._sizes(low, high), np.arange(0, high - low, _GROUP))
            ends = np.cumsum(groups) + total
            yield ends - groups
            total = int(ends[-1])
