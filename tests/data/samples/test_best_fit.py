"""`data.samples.best_fit`: the plan on a histogram against packing item by item."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openchatkit.data.samples.best_fit import best_fit_decreasing


def item_by_item(sizes: list[int], capacity: int) -> list[list[int]]:
    """Each item, largest first, into the fullest row that has room for it."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


def rows_of(sizes: list[int], capacity: int) -> list[list[int]]:
    """The rows of the plan, each item checked to be dealt once."""
    plan = best_fit_decreasing(np.bincount(sizes, minlength=capacity + 1))
    rows, seen = [], set()
    for number in range(plan.rows):
        row, items = plan.row(number)
        rows.append(row.tolist())
        for item in zip(row.tolist(), items.tolist(), strict=True):
            assert item not in seen
            seen.add(item)
    assert seen == {(size, number) for size, count in Counter(sizes).items() for number in range(count)}
    return rows


@settings(deadline=None)
@given(st.integers(1, 40).flatmap(lambda top: st.tuples(st.just(top), st.lists(st.integers(1, top), max_size=120))))
def test_rows_are_those_of_item_by_item(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    rows = rows_of(sizes, capacity)
    assert all(row == sorted(row, reverse=True) for row in rows)
    assert max(map(sum, rows), default=0) <= capacity
    assert Counter(map(sum, rows)) == Counter(map(sum, item_by_item(sizes, capacity)))


@pytest.mark.parametrize("seed", range(3))
def test_sizes_as_of_documents(seed: int) -> None:
    """Few long, many short, several of one size: nearly nothing is wasted."""
    generator = np.random.RandomState(seed)
    sizes = np.clip(generator.lognormal(3, 1, 800), 1, 256).astype(int).tolist()
    rows = rows_of(sizes, 256)
    assert len(rows) == len(item_by_item(sizes, 256))
    assert 1 - sum(sizes) / (len(rows) * 256) < 0.02


def test_any_number_of_items() -> None:
    histogram = np.zeros(101, np.int64)
    histogram[[60, 30, 10, 7]] = [10**12, 10**12 + 1, 10**12, 5]
    plan = best_fit_decreasing(histogram)
    assert plan.rows == 10**12 + 1
    assert plan.row(10**12 // 2)[0].tolist() == [60, 30, 10]
    assert plan.rows_before[-1] == plan.rows


def test_no_items() -> None:
    assert best_fit_decreasing([0, 0, 0]).rows == 0
