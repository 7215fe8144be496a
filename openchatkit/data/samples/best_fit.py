"""Best-fit decreasing bin packing of very many items of few sizes.

Items are taken largest first; each goes into the fullest row that still has room for it, or opens a row. Items of the
same size are alike, and so are rows with the same space left, so the work is done on the histogram of sizes (as in
Krell et al., arXiv 2107.02027) and takes no longer for a billion items than for a thousand. The rows are those that
placing item by item gives (as in Ding et al., arXiv 2404.10830, with the same bound on waste).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The content of a row, last placed first: (the content before, size, number of items), or None.
_Pattern = tuple["_Pattern", int, int] | None


@dataclass(frozen=True)
class PackingPlan:
    """Rows as patterns, so that the content of row number r is arithmetic.

    Pattern p makes rows rows_before[p] to rows_before[p + 1] - 1. Entries begins[p] to begins[p + 1] - 1 describe each
    of them: counts[e] items of sizes[e], those of its first row from number firsts[e] on. All int64.
    """

    rows: int
    rows_before: np.ndarray
    begins: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sizes of a row's items, largest first, and each one's number among all items of its size."""
        pattern = int(np.searchsorted(self.rows_before, number, side="right")) - 1
        entries = slice(int(self.begins[pattern]), int(self.begins[pattern + 1]))
        counts = self.counts[entries]
        firsts = self.firsts[entries] + (number - int(self.rows_before[pattern])) * counts
        ends = np.cumsum(counts)
        items = np.repeat(firsts - (ends - counts), counts) + np.arange(ends[-1])
        return np.repeat(self.sizes[entries], counts), items


def best_fit_decreasing(histogram: Sequence[int] | np.ndarray) -> PackingPlan:
    """Pack histogram[size] items of every size from 1 up into rows with room for len(histogram) - 1."""
    capacity = len(histogram) - 1
    rows = _Rows()
    for size in range(capacity, 0, -1):
        left = int(histogram[size])
        while left:
            space, count, pattern = rows.take(size) or (capacity, left, None)
            left -= rows.place(space, count, pattern, size, left)
    return _make_plan(rows.all())


class _Rows:
    """Rows by the space they have left, as groups of (number of rows, content of each)."""

    def __init__(self) -> None:
        self._spaces: list[int] = []  # that any row has, ascending
        self._groups: dict[int, list[tuple[int, _Pattern]]] = {}

    def take(self, size: int) -> tuple[int, int, _Pattern] | None:
        """Take out a group of the fullest rows with room for `size`: (their space, their number, content of each)."""
        at = bisect_left(self._spaces, size)
        if at == len(self._spaces):
            return None
        space = self._spaces[at]
        groups = self._groups[space]
        count, pattern = groups.pop()
        if not groups:
            del self._spaces[at], self._groups[space]
        return space, count, pattern

    def place(self, space: int, count: int, pattern: _Pattern, size: int, items: int) -> int:
        """Put `items` of `size` into `count` rows in turn, and the rows back; return how many were placed."""
        each = space // size  # a row that took one item and has room for another is still the fullest with room
        full, rest = divmod(min(items, count * each), each)
        self._put(space - each * size, full, (pattern, size, each))
        if rest:
            self._put(space - rest * size, 1, (pattern, size, rest))
        if pattern:  # a new row is opened only when an item needs it
            self._put(space, count - full - bool(rest), pattern)
        return full * each + rest

    def all(self) -> list[tuple[int, _Pattern]]:
        """Return all rows, the fullest first."""
        return [group for space in self._spaces for group in self._groups[space]]

    def _put(self, space: int, count: int, pattern: _Pattern) -> None:
        if count:
            if space not in self._groups:
                insort(self._spaces, space)
                self._groups[space] = []
            self._groups[space].append((count, pattern))


def _make_plan(groups: list[tuple[int, _Pattern]]) -> PackingPlan:
    rows_before, begins, sizes, counts, firsts = [0], [0], [], [], []
    used: dict[int, int] = {}
    for rows, pattern in groups:
        entries = []
        while pattern:
            pattern, size, count = pattern
            entries.append((size, count))
        for size, count in reversed(entries):
            sizes.append(size)
            counts.append(count)
            firsts.append(used.get(size, 0))
            used[size] = firsts[-1] + rows * count
        rows_before.append(rows_before[-1] + rows)
        begins.append(len(sizes))
    arrays = (np.array(values, np.int64) for values in (rows_before, begins, sizes, counts, firsts))
    return PackingPlan(rows_before[-1], *arrays)
