"""Stored vectors: their length, their order, and refused numbers."""

import numpy as np
import pytest

from openchatkit.errors import UserError
from openchatkit.retrieval import vector_store


def some(rows, dimension=8, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


def test_parts_become_one_array_of_length_one(tmp_path):
    path, made = tmp_path / "v.npy", some(10)
    vector_store.write(path, [made[:3], made[3:]], rows=10, dimension=8, metric="cosine")
    kept = vector_store.open_array(path, rows=10, dimension=8)
    assert kept.dtype == np.float16
    np.testing.assert_allclose(kept, made / np.linalg.norm(made, axis=1, keepdims=True), atol=1e-3)
    vector_store.write(path, [made], rows=10, dimension=8, metric="dot")
    np.testing.assert_allclose(vector_store.open_array(path, rows=10, dimension=8), made, atol=2e-3)


@pytest.mark.parametrize(("value", "metric"), [(np.nan, "cosine"), (np.inf, "dot"), (7e4, "dot"), (0, "cosine")])
def test_numbers_that_cannot_be_compared_are_refused_with_their_row(tmp_path, value, metric):
    made = some(20)
    made[17] = value
    with pytest.raises(UserError, match="vector 17 has numbers that are not finite, or no length"):
        vector_store.write(tmp_path / "v", [made[:10], made[10:]], rows=20, dimension=8, metric=metric)


def test_there_is_a_vector_for_each_row_and_of_the_dimension(tmp_path):
    with pytest.raises(UserError, match="5 passages but 4 vectors"):
        vector_store.write(tmp_path / "v", [some(4)], rows=5, dimension=8, metric="dot")
    with pytest.raises(UserError, match=r"shape \(4, 8\), the index has 9 numbers a vector"):
        vector_store.write(tmp_path / "v", [some(4)], rows=4, dimension=9, metric="dot")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "v.npy"
    np.save(path, some(4).astype(np.float16))
    with pytest.raises(UserError, match=r"\(4, 8\), the manifest says float16 \(4, 9\)"):
        vector_store.open_array(path, rows=4, dimension=9)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        vector_store.open_array(path, rows=4, dimension=8)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        vector_store.open_array(path, rows=4, dimension=8)


def test_exact_search_is_a_sorted_product(monkeypatch):
    monkeypatch.setattr(vector_store, "_PIECE", 7)
    kept, queries = some(40).astype(np.float16), some(3, seed=1)
    products = queries @ kept.astype(np.float32).T
    for k in (1, 5, 40):
        scores, rows = vector_store.search_exactly(kept, queries, k)
        np.testing.assert_array_equal(rows, np.argsort(-products, axis=1)[:, :k])
        np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :k], atol=1e-5)
