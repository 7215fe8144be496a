"""Documents whose tokens identify them."""

import itertools
from collections.abc import Sequence


def numbered(sizes: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents of these sizes whose tokens count up through all of them, one number skipped after each."""
    starts = itertools.accumulate((size + 1 for size in sizes), initial=first)
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
