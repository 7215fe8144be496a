"""Searching vectors with faiss: results, types of indices, and refused files."""

import dataclasses
import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_gpus import FakeGpus

from openchatkit.errors import UserError
from openchatkit.retrieval import dense, vector_store

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def vectors():
    random = np.random.default_rng(0)
    made = np.repeat(random.standard_normal((60, 32)), 10, axis=0) + 0.4 * random.standard_normal((600, 32))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("kind", [dense.FLAT, dense.LISTS, dense.CODES])
def test_the_nearest_rows_are_found_with_their_products(tmp_path, vectors, kind):
    record = dense.build(vectors, tmp_path / "d", kind=kind)
    assert record.type == kind
    assert record.recall >= dense.RECALL
    opened = dense.Dense.open(tmp_path / "d", record, vectors)
    queries = vectors[::20].astype(np.float32)
    rows = vector_store.search_exactly(vectors, queries, 10)[1]
    found = [opened.search(query, 10) for query in queries]
    assert np.mean([len(np.intersect1d(a, b[1])) / 10 for a, b in zip(rows, found, strict=True)]) > 0.95
    for query, (products, numbers) in zip(queries, found, strict=True):
        np.testing.assert_allclose(products, vector_store.inner_products(vectors, query, numbers), rtol=1e-5)
        assert (np.diff(products) <= 0).all()


@pytest.mark.parametrize("kind", [dense.FLAT, dense.LISTS])
def test_k_may_exceed_the_number_of_rows(tmp_path, vectors, kind):
    record = dense.build(vectors[:50], tmp_path / "d", kind=kind)
    opened = dense.Dense.open(tmp_path / "d", record, vectors[:50])
    rows = opened.search(vectors[3].astype(np.float32), 1000)[1]
    assert sorted(rows.tolist()) == list(range(50))
    assert len(opened.search(vectors[3].astype(np.float32), 0)[1]) == 0


def test_one_row_is_enough(tmp_path, vectors):
    for kind in (dense.FLAT, dense.LISTS):
        record = dense.build(vectors[:1], tmp_path / "d", kind=kind)
        opened = dense.Dense.open(tmp_path / "d", record, vectors[:1])
        assert opened.search(vectors[0].astype(np.float32), 5)[1].tolist() == [0]


def test_the_index_type_depends_on_the_number_of_rows():
    sizes = (1, 50_000, 50_001, 19_999_999, 20_000_000)
    assert [dense.kind_for(rows) for rows in sizes] == [dense.FLAT] * 2 + [dense.LISTS] * 2 + [dense.CODES]


def test_the_same_vectors_give_the_same_file(tmp_path, vectors):
    for name in ("a", "b"):
        dense.build(vectors, tmp_path / name, kind=dense.LISTS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_index_of_another_shape_than_the_record_says_is_refused(tmp_path, vectors):
    record = dense.build(vectors, tmp_path / "d", kind=dense.LISTS)
    with pytest.raises(UserError, match="has rows 600, the manifest says 599"):
        dense.Dense.open(tmp_path / "d", record, vectors[:599])
    with pytest.raises(UserError, match="has numbers a vector 32, the manifest says 16"):
        dense.Dense.open(tmp_path / "d", record, vectors[:, :16])
    faiss.write_index(faiss.index_factory(32, "HNSW8,Flat"), str(tmp_path / "d"))
    with pytest.raises(UserError, match="is a faiss IndexHNSWFlat: expected IndexIVFScalarQuantizer"):
        dense.Dense.open(tmp_path / "d", record, vectors)


def test_types_of_inner_indices_are_checked_too(tmp_path):
    path = tmp_path / "d"
    faiss.write_index(faiss.index_factory(32, "IDMap,HNSW8,Flat"), str(path))
    with pytest.raises(UserError, match="is a faiss IndexHNSWFlat"):
        dense.read_index(path, types={"IndexIDMap", "IndexFlat"})
    faiss.write_index(faiss.index_factory(32, "IDMap,Flat"), str(path))
    assert dense.read_index(path, types={"IndexIDMap", "IndexFlatL2"}).ntotal == 0


def test_a_cut_file_is_refused_by_name(tmp_path, vectors):
    path = tmp_path / "d"
    for kind in (dense.FLAT, dense.LISTS):
        record = dense.build(vectors, path, kind=kind)
        whole = path.read_bytes()
        for size in (0, 3, 20, len(whole) // 2):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match="faiss cannot read"):
                dense.Dense.open(path, record, vectors)
    limit = faiss.get_deserialization_vector_byte_limit()
    assert limit > 1 << 30, "the limit of one file was not reset"


def test_opening_from_threads_restores_the_byte_limit(tmp_path, vectors):
    records = [dense.build(vectors[:rows], tmp_path / str(rows), kind=dense.LISTS) for rows in (50, 600)]
    limit = faiss.get_deserialization_vector_byte_limit()

    def opened(number):
        rows = (50, 600)[number % 2]
        dense.Dense.open(tmp_path / str(rows), records[number % 2], vectors[:rows])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(opened, range(200)))
    assert faiss.get_deserialization_vector_byte_limit() == limit


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
@pytest.mark.parametrize("kind", [dense.FLAT, dense.LISTS])
def test_a_full_disk_is_reported_as_such(vectors, kind):
    with pytest.raises(OSError, match="No space left") as caught:
        dense.build(vectors, Path("/dev/full"), kind=kind)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("kind", [dense.LISTS, dense.CODES])
@pytest.mark.parametrize(("device", "numbers"), [("cuda", [0, 1]), ("auto", [0, 1]), ("cuda:1", [1])])
def test_gpus_find_what_the_cpu_finds(tmp_path, vectors, monkeypatch, warnings, kind, device, numbers):
    record = dense.build(vectors, tmp_path / "d", kind=kind)
    opened = dense.Dense.open(tmp_path / "d", record, vectors)
    queries = vectors[::60].astype(np.float32)
    expected = [opened.search(query, k) for query in queries for k in (1, 10, 600)]
    gpus = FakeGpus(monkeypatch)
    assert opened.to_gpus(device)
    assert gpus.given == numbers
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda each: opened.search(*each), [(query, k) for query in queries for k in (1, 10, 600)])
        )
    for (scores, rows), (products, numbers) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(rows, numbers)
        np.testing.assert_array_equal(scores, products)
    assert len(gpus.searches) >= len(expected)
    assert warnings == []


def test_the_cpu_searches_beyond_the_limits_of_gpus(tmp_path, monkeypatch, warnings):
    many = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float16)
    record = dense.build(many, tmp_path / "d", kind=dense.LISTS, lists=4)
    opened = dense.Dense.open(tmp_path / "d", dataclasses.replace(record, candidates=100), many)
    gpus = FakeGpus(monkeypatch)
    assert opened.to_gpus()
    assert len(opened.search(many[0].astype(np.float32), 100)[1]) == 100
    assert gpus.searches == [(2048, record.probes)], "10,000 candidates would be too many"
    assert len(opened.search(many[0].astype(np.float32), 3000)[1]) == 3000
    assert len(gpus.searches) == 1
    assert warnings == []


def test_a_gpu_failure_is_warned_of_and_the_cpu_searches(tmp_path, vectors, monkeypatch, warnings):
    record = dense.build(vectors, tmp_path / "d", kind=dense.LISTS)
    opened = dense.Dense.open(tmp_path / "d", record, vectors)
    query = vectors[7].astype(np.float32)
    gpus = FakeGpus(monkeypatch)
    gpus.error = "Error in alloc at x.cpp:1: Error: 'err == cudaSuccess' failed: out\nof memory"
    assert not opened.to_gpus()
    assert opened.search(query, 3)[1][0] == 7
    gpus.error = None
    assert opened.to_gpus()
    gpus.error = "Error: out of memory"
    assert [opened.search(query, 3)[1][0] for _ in range(3)] == [7] * 3
    told = "vectors are searched on the CPU, since faiss cannot on a GPU: "
    assert warnings == [f"{told}'err == cudaSuccess' failed: out of memory", f"{told}out of memory"]


def test_flat_indices_and_faiss_without_gpus_stay_on_the_cpu(tmp_path, vectors, monkeypatch):
    flat, lists = (dense.build(vectors, tmp_path / kind, kind=kind) for kind in (dense.FLAT, dense.LISTS))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert not dense.Dense.open(tmp_path / dense.LISTS, lists, vectors).to_gpus()
    gpus = FakeGpus(monkeypatch)
    assert not dense.Dense.open(tmp_path / dense.FLAT, flat, vectors).to_gpus()
    assert gpus.given is None
