"""A found snippet with its neighbours about the same subject, shown instead of three sentences.

From the snippet outwards, in each direction, neighbours are added as long as the cosine of their vector to that of the
snippet is above a threshold, as in the original kit's `wikiindexquery.py`. Unlike there, neighbours of all snippets are
embedded together, and none is from another article or beyond the ends of the table.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Snippets(Protocol):
    """Texts by row number; those of one document are adjacent."""

    def text(self, number: int) -> str:
        """Return the text of a row."""

    def neighbours(self, number: int, width: int) -> range:
        """Return the rows of the same document around `number`, itself included, at most `width` on each side."""


def expand(
    table: Snippets, rows: Sequence[int], embed: Callable[[list[str]], np.ndarray], *, width: int, threshold: float
) -> list[range]:
    """Return the rows to show for each row: itself, and at most `width` neighbours on each side.

    `embed` returns float32 [n, d] for n texts; it is called once, or not at all if there are no neighbours.
    """
    windows = [table.neighbours(row, width) for row in rows]
    if all(len(window) == 1 for window in windows):
        return windows
    numbers = sorted({number for window in windows for number in window})
    vectors = embed([table.text(number) for number in numbers])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = dict(zip(numbers, vectors / np.maximum(lengths, 1e-12), strict=True))
    return [_extend(window, row, directions, threshold) for window, row in zip(windows, rows, strict=True)]


def without_overlap(rows: Sequence[int], shown: Sequence[range]) -> list[tuple[int, range]]:
    """Assign each row to the first range that shows it; later ranges end there, and assigned rows are dropped."""
    taken: set[int] = set()
    separate = []
    for row, window in zip(rows, shown, strict=True):
        if row in taken:
            continue
        first, end = row, row + 1
        while first - 1 in window and first - 1 not in taken:
            first -= 1
        while end in window and end not in taken:
            end += 1
        taken.update(range(first, end))
        separate.append((row, range(first, end)))
    return separate


def _extend(window: range, row: int, directions: dict[int, np.ndarray], threshold: float) -> range:
    def near(number: int) -> bool:
        return number in window and float(directions[number] @ directions[row]) > threshold

    first, end = row, row + 1
    while near(first - 1):
        first -= 1
    while near(end):
        end += 1
    return range(first, end)
