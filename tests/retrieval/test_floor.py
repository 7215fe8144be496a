"""What a passage must show to be found, and how that is measured."""

import numpy as np
import pytest

from openchatkit.formats.retrieval_index import Floor
from openchatkit.retrieval import floor
from openchatkit.retrieval.floor import above


class Nearness:
    """Makes of each remark a vector with a cosine of its own to the first axis."""

    def __init__(self, cosines):
        self.cosines = np.asarray(cosines, np.float32)

    def encode(self, texts, *, query):
        assert query
        assert texts == floor.REMARKS
        return np.stack([self.cosines, np.sqrt(1 - self.cosines**2)], axis=1)


def test_a_row_is_found_by_its_cosine_or_by_less_of_it_and_words():
    asked = Floor(cosine=0.5, weak_cosine=0.2, strength=1.0, strength_alone=0.7)
    cosines, strengths = np.array([0.5, 0.4, 0.4, 0.1]), np.array([0.0, 0.9, 1.0, 9.0])
    assert above(asked, cosines, strengths, np.zeros(4)).tolist() == [True, False, True, False]
    assert above(asked, None, strengths, np.zeros(4)).tolist() == [False, True, True, True]


def test_a_row_with_what_a_question_is_about_needs_less():
    asked = Floor(cosine=0.5, weak_cosine=0.2, strength=1.0, strength_alone=0.7)
    cosines, strengths, shares = np.array([0.3, 0.3, 0.0, 0.0]), np.full(4, 0.4), np.array([0.2, 0.3, 0.3, 1.0])
    assert above(asked, cosines, strengths, shares).tolist() == [False, True, False, True]
    assert above(asked, None, strengths, shares).tolist() == [False, True, True, True]
    high = Floor(cosine=2.0, weak_cosine=2.0, strength=9.0, strength_alone=9.0)
    assert not above(high, cosines, strengths, shares).any()


def test_without_vectors_words_alone_are_asked_and_without_measure_no_cosine():
    assert above(floor.NO_COSINE, np.array([-0.9]), np.array([0.8]), np.zeros(1)).all()
    assert above(floor.NO_COSINE, None, np.array([0.5, 0.6]), np.zeros(2)).tolist() == [False, True]


def test_a_floor_lies_a_fifth_above_what_remarks_typically_reach():
    cosines = np.linspace(0.1, 0.5, len(floor.REMARKS))
    rows = np.array([[1, 0], [-1, 0], [0, -1]], np.float16)
    found = floor.measured(Nearness(cosines), rows)
    assert found.cosine == pytest.approx(0.3 + 0.2 * 0.7, abs=1e-3)
    assert found.weak_cosine == pytest.approx(0.3 + 0.05 * 0.7, abs=1e-3)
    # Lengths, which some encoders leave as they come, make no difference, nor do rows that nothing is near to.
    assert floor.measured(Nearness(cosines), 3 * rows) == found


def test_an_index_that_remarks_are_at_home_in_asks_for_little_more_than_they_reach():
    high = floor.measured(Nearness(np.full(len(floor.REMARKS), 0.9)), np.array([[1, 0]], np.float16))
    assert 0.9 < high.weak_cosine < high.cosine < 0.93


def test_a_large_index_is_sampled_always_alike():
    assert floor.sample(3).tolist() == [0, 1, 2]
    some = floor.sample(1_000_000)
    assert len(np.unique(some)) == len(some) == 50_000
    assert some.max() > 900_000
    assert np.array_equal(some, floor.sample(1_000_000))
