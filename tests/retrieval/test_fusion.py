"""Fused order, and the floor."""

import numpy as np

from openchatkit.formats.retrieval_index import EncoderRecord, Floor
from openchatkit.retrieval import fusion


def test_candidates_are_those_of_all_orders_once_each():
    orders = [np.array([7, 3, 5]), np.array([3, 9]), np.empty(0, np.int64)]
    assert fusion.candidates(orders).tolist() == [7, 3, 5, 9]
    assert fusion.candidates([np.empty(0, np.int64)]).tolist() == []


def test_scores_are_means_of_places_between_the_lowest_and_the_highest():
    cosines, counted = np.array([0.1, 0.9, 0.5], np.float32), np.array([0.0, 3.0, 12.0], np.float32)
    np.testing.assert_allclose(fusion.fuse([cosines, counted]), [0, (1 + 0.25) / 2, (0.5 + 1) / 2], rtol=1e-6)
    np.testing.assert_allclose(fusion.fuse([counted]), [0, 0.25, 1])


def test_a_kind_that_tells_nothing_changes_no_order():
    cosines = np.array([0.1, 0.9, 0.5])
    assert np.argsort(fusion.fuse([cosines, np.zeros(3)])).tolist() == [0, 2, 1]
    assert fusion.fuse([np.array([4.0])]).tolist() == [1]
    assert fusion.fuse([np.empty(0), np.empty(0)]).tolist() == []


def test_a_row_is_found_by_its_cosine_or_by_less_of_it_and_words():
    floor = Floor(cosine=0.5, weak_cosine=0.2, strength=1.0, strength_alone=0.7)
    cosines, strengths = np.array([0.5, 0.4, 0.4, 0.1]), np.array([0.0, 0.9, 1.0, 9.0])
    assert fusion.above(floor, cosines, strengths).tolist() == [True, False, True, False]
    assert fusion.above(floor, None, strengths).tolist() == [False, True, True, True]


def test_no_cosine_is_asked_of_an_encoder_for_products():
    record = EncoderRecord("e", "d", 8, "dot", 128)
    assert fusion.above(fusion.default_floor(record), np.array([-0.9]), np.array([0.0])).all()
    assert fusion.default_floor(None) == fusion.FLOOR
