"""A found snippet and those of its neighbours that are about the same: what is shown in the place of three sentences.

From the snippet outwards, each way, neighbours are taken in as long as the cosine between theirs and the snippet's own
vector is above a threshold, as in the original kit's `wikiindexquery.py`. Unlike there, all neighbours of all snippets
are embedded together, and none is of another article or beyond the ends of the table.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Snippets(Protocol):
    """Texts by row number, those of one document side by side."""

    def text(self, number: int) -> str:
        """A row's text."""

    def neighbours(self, number: int, width: int) -> range:
        """The rows within `width` of one that are of its document, itself among them."""


def expand(
    table: Snippets,
    rows: Sequence[int],
    embed: Callable[[list[str]], np.ndarray],
    *,
    width: int,
    threshold: float,
) -> list[range]:
    """For each row, the rows to show: itself, and at most `width` neighbours on each side.

    `embed` makes float32 [n, d] of n texts; it is called once, or not at all where there are no neighbours.
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
    """The same without a row twice: each goes to the first that shows it, and one that has gone is shown no more."""
    taken: set[int] = set()
    parted = []
    for row, window in zip(rows, shown, strict=True):
        if row in taken:
            continue
        first, end = row, row + 1
        while first - 1 in window and first - 1 not in taken:
            first -= 1
        while end in window and end not in taken:
            end += 1
        taken.update(range(first, end))
        parted.append((row, range(first, end)))
    return parted


def _extend(window: range, row: int, directions: dict[int, np.ndarray], threshold: float) -> range:
    def near(number: int) -> bool:
        return number in window and float(directions[number] @ directions[row]) > threshold

    first, end = row, row + 1
    while near(first - 1):
        first -= 1
    while near(end):
        end += 1
    return range(first, end)
