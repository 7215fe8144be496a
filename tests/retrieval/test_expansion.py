"""`wikipedia.expansion`: neighbours about the same subject, within the article and the table."""

import numpy as np
import pytest

from openchatkit.retrieval.wikipedia.expansion import expand, without_overlap


class Articles:
    """Two articles of five rows; a text is its row's number."""

    def text(self, number: int) -> str:
        assert 0 <= number < 10, number
        return str(number)

    def neighbours(self, number: int, width: int) -> range:
        first = 5 * (number // 5)
        return range(max(first, number - width), min(first + 5, number + width + 1))


def embedder(far: set[int], calls: list[list[str]]):
    """All texts have one direction and lengths of their own, but for those that are `far`."""

    def embed(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        return np.array([[0, 1] if int(text) in far else [1 + int(text), 0] for text in texts], np.float32)

    return embed


@pytest.mark.parametrize(
    ("row", "width", "far", "expected"),
    [
        (2, 1, set(), range(1, 4)),
        (2, 5, set(), range(0, 5)),
        (0, 5, set(), range(0, 5)),
        (5, 5, set(), range(5, 10)),
        (9, 2, set(), range(7, 10)),
        (2, 5, {1}, range(2, 5)),
        (2, 5, {1, 3}, range(2, 3)),
        (7, 5, {5}, range(6, 10)),
        (3, 0, set(), range(3, 4)),
    ],
)
def test_which_neighbours_are_shown(row, width, far, expected):
    assert expand(Articles(), [row], embedder(far, []), width=width, threshold=0.5) == [expected]


def test_neighbours_of_all_hits_are_embedded_together_and_once():
    calls = []
    shown = expand(Articles(), [1, 2, 8], embedder({4}, calls), width=2, threshold=0.5)
    assert shown == [range(0, 4), range(0, 4), range(6, 10)]
    assert calls == [[str(number) for number in (0, 1, 2, 3, 4, 6, 7, 8, 9)]]


def test_nothing_is_embedded_without_neighbours():
    calls = []
    assert expand(Articles(), [1, 8], embedder(set(), calls), width=0, threshold=0.5) == [range(1, 2), range(8, 9)]
    assert calls == []


def test_a_cosine_at_the_threshold_is_not_enough():
    def embed(texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 2), np.float32) / np.sqrt(2)

    assert expand(Articles(), [2], embed, width=2, threshold=1.0001) == [range(2, 3)]
    assert expand(Articles(), [2], embed, width=2, threshold=0.999) == [range(0, 5)]


def test_no_row_is_shown_twice():
    rows, shown = [4, 6, 5, 9, 1], [range(2, 7), range(5, 8), range(3, 8), range(7, 10), range(0, 4)]
    assert without_overlap(rows, shown) == [(4, range(2, 7)), (9, range(7, 10)), (1, range(0, 2))]
    assert without_overlap([], []) == []


def reference(table: list[tuple[int, str]], vectors: np.ndarray, row: int, width: int, threshold: float) -> range:
    """The expansion as it is documented, snippet by snippet in float64, from (article, text) rows."""
    inside = []
    for step in (-1, 1):
        number, taken = row + step, 0
        while 0 <= number < len(table) and taken < width and table[number][0] == table[row][0]:
            cosine = vectors[number] @ vectors[row] / np.sqrt((vectors[number] ** 2).sum() * (vectors[row] ** 2).sum())
            if not cosine > threshold:
                break
            number, taken = number + step, taken + 1
        inside.append(taken)
    return range(row - inside[0], row + inside[1] + 1)


@pytest.mark.parametrize("seed", range(20))
def test_expansion_matches_a_plain_reference(seed):
    random = np.random.default_rng(seed)
    table = [(article, f"{article}") for article in range(30) for _ in range(random.integers(1, 9))]
    about = random.normal(size=(len(table), 6))
    vectors = about + 2 * about[np.maximum(0, np.arange(len(table)) - 1)]  # like the one before, more or less

    class Drawn:
        def text(self, number: int) -> str:
            return str(number)

        def neighbours(self, number: int, width: int) -> range:
            near = range(max(0, number - width), min(len(table), number + width + 1))
            same = [each for each in near if table[each][0] == table[number][0]]
            return range(same[0], same[-1] + 1)

    rows = random.choice(len(table), 12, replace=False).tolist()
    width, threshold = int(random.integers(0, 8)), float(random.uniform(-0.2, 0.8))
    shown = expand(
        Drawn(),
        rows,
        lambda texts: vectors[list(map(int, texts))].astype(np.float32),
        width=width,
        threshold=threshold,
    )
    assert shown == [reference(table, vectors, row, width, threshold) for row in rows]
