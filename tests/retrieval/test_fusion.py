"""Fused order, and the floor."""

import numpy as np

from openchatkit.formats.retrieval_index import EncoderRecord, Floor
from openchatkit.retrieval import fusion


def test_rows_in_both_orders_come_first_and_sums_are_of_reciprocal_ranks():
    rows, scores = fusion.fuse([np.array([7, 3, 5]), np.array([3, 9])])
    assert rows.tolist() == [3, 7, 9, 5]
    first, second, third = (1 / (fusion.RANK_OFFSET + rank) for rank in (1, 2, 3))
    np.testing.assert_allclose(scores, [first + second, first, second, third])


def test_of_equal_sums_the_first_order_decides():
    assert fusion.fuse([np.array([4, 8, 1]), np.array([1, 8, 4])])[0].tolist() == [4, 1, 8]
    assert fusion.fuse([np.array([9]), np.array([2])])[0].tolist() == [9, 2]


def test_one_order_and_none():
    assert fusion.fuse([np.array([5, 2])])[0].tolist() == [5, 2]
    assert fusion.fuse([np.empty(0, np.int64)])[0].tolist() == []


def test_a_row_is_found_by_its_cosine_or_by_less_of_it_and_words():
    floor = Floor(cosine=0.5, weak_cosine=0.2, strength=1.0, strength_alone=0.7)
    cosines, strengths = np.array([0.5, 0.4, 0.4, 0.1]), np.array([0.0, 0.9, 1.0, 9.0])
    assert fusion.above(floor, cosines, strengths).tolist() == [True, False, True, False]
    assert fusion.above(floor, None, strengths).tolist() == [False, True, True, True]


def test_no_cosine_is_asked_of_an_encoder_for_products():
    record = EncoderRecord("e", "d", 8, "dot", 128)
    assert fusion.above(fusion.default_floor(record), np.array([-0.9]), np.array([0.0])).all()
    assert fusion.default_floor(None) == fusion.FLOOR
