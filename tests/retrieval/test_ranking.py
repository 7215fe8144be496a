"""Fused order, the score threshold, and how it is measured."""

import numpy as np
import pytest

from openchatkit.formats.retrieval_index import ScoreThreshold
from openchatkit.retrieval import ranking
from openchatkit.retrieval.ranking import passes


class Nearness:
    """Makes of each remark a vector with a cosine of its own to the first axis."""

    def __init__(self, cosines):
        self.cosines = np.asarray(cosines, np.float32)

    def encode(self, texts, *, query):
        assert query
        assert texts == ranking.REMARKS
        return np.stack([self.cosines, np.sqrt(1 - self.cosines**2)], axis=1)


def test_a_row_passes_by_its_cosine_or_by_a_lower_one_and_words():
    asked = ScoreThreshold(cosine=0.5, weak_cosine=0.2, strength=1.0, strength_alone=0.7)
    cosines, strengths = np.array([0.5, 0.4, 0.4, 0.1]), np.array([0.0, 0.9, 1.0, 9.0])
    assert passes(asked, cosines, strengths, np.zeros(4)).tolist() == [True, False, True, False]
    assert passes(asked, None, strengths, np.zeros(4)).tolist() == [False, True, True, True]


def test_a_row_with_the_rare_words_of_a_question_needs_less():
    asked = ScoreThreshold(cosine=0.5, weak_cosine=0.2, strength=1.0, strength_alone=0.7)
    cosines, strengths, shares = np.array([0.3, 0.3, 0.0, 0.0]), np.full(4, 0.4), np.array([0.2, 0.3, 0.3, 1.0])
    assert passes(asked, cosines, strengths, shares).tolist() == [False, True, False, True]
    assert passes(asked, None, strengths, shares).tolist() == [False, True, True, True]
    high = ScoreThreshold(cosine=2.0, weak_cosine=2.0, strength=9.0, strength_alone=9.0)
    assert not passes(high, cosines, strengths, shares).any()


def test_without_vectors_words_decide_and_an_unmeasured_threshold_asks_for_no_cosine():
    assert passes(ranking.NO_COSINE, np.array([-0.9]), np.array([0.8]), np.zeros(1)).all()
    assert passes(ranking.NO_COSINE, None, np.array([0.5, 0.6]), np.zeros(2)).tolist() == [False, True]


def test_the_threshold_is_a_fifth_above_the_median_of_remarks():
    cosines = np.linspace(0.1, 0.5, len(ranking.REMARKS))
    rows = np.array([[1, 0], [-1, 0], [0, -1]], np.float16)
    found = ranking.measure_threshold(Nearness(cosines), rows)
    assert found.cosine == pytest.approx(0.3 + 0.2 * 0.7, abs=1e-3)
    assert found.weak_cosine == pytest.approx(0.3 + 0.05 * 0.7, abs=1e-3)
    # Lengths, which some encoders leave as they come, make no difference, nor do rows that nothing is near to.
    assert ranking.measure_threshold(Nearness(cosines), 3 * rows) == found


def test_an_index_close_to_remarks_has_a_threshold_just_above_them():
    high = ranking.measure_threshold(Nearness(np.full(len(ranking.REMARKS), 0.9)), np.array([[1, 0]], np.float16))
    assert 0.9 < high.weak_cosine < high.cosine < 0.93


def test_the_sample_of_a_large_index_is_always_the_same():
    assert ranking.sample_rows(3).tolist() == [0, 1, 2]
    some = ranking.sample_rows(1_000_000)
    assert len(np.unique(some)) == len(some) == 50_000
    assert some.max() > 900_000
    assert np.array_equal(some, ranking.sample_rows(1_000_000))


def test_merged_candidates_are_those_of_all_orders_once_each():
    orders = [np.array([7, 3, 5]), np.array([3, 9]), np.empty(0, np.int64)]
    assert ranking.merge_candidates(orders).tolist() == [7, 3, 5, 9]
    assert ranking.merge_candidates([np.empty(0, np.int64)]).tolist() == []


def test_fused_scores_are_means_of_normalized_scores():
    cosines, counted = np.array([0.1, 0.9, 0.5], np.float32), np.array([0.0, 3.0, 12.0], np.float32)
    np.testing.assert_allclose(ranking.fuse([cosines, counted]), [0, (1 + 0.25) / 2, (0.5 + 1) / 2], rtol=1e-6)
    np.testing.assert_allclose(ranking.fuse([counted]), [0, 0.25, 1])


def test_equal_scores_of_one_kind_do_not_change_the_order():
    cosines = np.array([0.1, 0.9, 0.5])
    assert np.argsort(ranking.fuse([cosines, np.zeros(3)])).tolist() == [0, 2, 1]
    assert ranking.fuse([np.array([4.0])]).tolist() == [1]
    assert ranking.fuse([np.empty(0), np.empty(0)]).tolist() == []
