"""In which order an epoch takes what it takes, and where in that order the tokens are.

An order is a pure function of (seed, source, epoch): it comes from a generator seeded with exactly these, and no state
is carried from one epoch to the next. Everything is worked out a chunk at a time, so that memory does not grow with the
number of documents; `data.samples.arrays` keeps the results.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from openchatkit.data.samples.arrays import CHUNK, Arrays

_VERSION = 1  # of all that is kept in files: raise it when anything is worked out in another way
_GROUP = 64  # sizes between two sums that are kept: an eighth of a byte for each
assert CHUNK % _GROUP == 0


def shuffled(arrays: Arrays, name: str, epoch: int, length: int, *, seed: Sequence[int]) -> np.ndarray:
    """The numbers below `length` in the epoch's order: uint32, or int64 where there are more than that holds."""

    def shuffle(order: np.ndarray) -> None:
        # RandomState's streams are frozen for ever, by promise, which those of numpy's newer generators are not.
        np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).shuffle(order)

    dtype = number_type(length)
    numbers = (np.arange(low, high, dtype=dtype) for low, high in chunks(length))
    return arrays.make(name, epoch, length, dtype, numbers, shuffle)


def digest(key: Sequence[int | str]) -> str:
    """A folder's name for the arrays of a source that `key` tells from all others."""
    return hashlib.sha256(json.dumps([_VERSION, *key]).encode()).hexdigest()[:32]


def number_type(length: int) -> np.dtype:
    """The type that numbers below `length` are kept in."""
    return np.dtype(np.uint32 if length < 1 << 32 else np.int64)


def chunks(length: int) -> Iterator[tuple[int, int]]:
    """(first, one behind the last) of successive chunks."""
    for low in range(0, length, CHUNK):
        yield low, min(low + CHUNK, length)


class RunningSums:
    """Where things of various sizes lie when they are laid one behind another, without a sum for each of them.

    `sizes(low, high)` are the sizes of things number low to high - 1: int64. Before every 64th thing the sum is kept;
    those between are added up when they are asked for.
    """

    def __init__(
        self, arrays: Arrays, name: str, epoch: int | None, length: int, sizes: Callable[[int, int], np.ndarray]
    ) -> None:
        self._length = length
        self._sizes = sizes
        self._before = arrays.make(name, epoch, -(-length // _GROUP), np.int64, self._sums())

    def span(self, position: int, count: int) -> tuple[int, np.ndarray, int]:
        """The things that hold `count` places from `position` on, or as many as there are.

        Returns the first one's number, the sizes of it and all that follow, and how far into the first `position` is.
        """
        group = int(np.searchsorted(self._before, position, side="right")) - 1
        behind = int(np.searchsorted(self._before, position + count, side="left"))
        low = group * _GROUP
        sizes = self._sizes(low, min(behind * _GROUP, self._length))
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
