"""Fused order."""

import numpy as np

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
