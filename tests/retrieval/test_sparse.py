"""BM25 against bm25s, which computes the same in another way; and refused files."""

import numpy as np
import pytest

from openchatkit.errors import UserError
from openchatkit.retrieval import sparse
from openchatkit.retrieval.sparse import Sparse, SparsePaths
from openchatkit.retrieval.tokenization import tokenize


def made_texts(count, seed=0):
    """Texts of words that are rare and common as in language."""
    random = np.random.default_rng(seed)
    return [" ".join(f"w{n}" for n in random.zipf(1.3, random.integers(0, 30)) if n < 400) for _ in range(count)]


@pytest.fixture
def paths(tmp_path):
    return SparsePaths(*(tmp_path / name for name in ("scores.npy", "postings.npy", "starts.npy", "words.arrow")))


def build(texts, paths):
    record = sparse.build(texts, paths, rows=len(texts), temporary=paths.scores.with_name("spill"))
    return Sparse(paths, record, len(texts))


@pytest.fixture
def peer(paths, monkeypatch):
    """The index of 500 texts, by us and by bm25s."""
    bm25s = pytest.importorskip("bm25s")
    monkeypatch.setattr(sparse, "_PIECE", 64)
    texts = made_texts(500)
    numbers = {}
    ids = [[numbers.setdefault(word, len(numbers)) for word in tokenize(text)] for text in texts]
    made = bm25s.BM25(k1=sparse.K1, b=sparse.B, method="lucene")
    made.index((ids, numbers), show_progress=False)
    return build(texts, paths), made, numbers


def test_scores_and_order_are_those_of_bm25s(peer):
    ours, theirs, numbers = peer
    for query in ("w1", "w1 w2 w3", "w7 w1 w90", "w399 w1", "w2 w2 w5 w11 w200 w300", "unheard w3"):
        expected = theirs.get_scores_from_ids([numbers[w] for w in dict.fromkeys(tokenize(query)) if w in numbers])
        for k in (1, 10, 500):
            scores, rows = ours.search(query, k)
            assert len(rows) == min(k, int((expected > 0).sum()))
            np.testing.assert_allclose(scores, np.sort(expected)[::-1][: len(scores)], rtol=1e-5)
            np.testing.assert_allclose(expected[rows], scores, rtol=1e-5)
            np.testing.assert_allclose(ours.scores(query, rows), scores, rtol=1e-5)


def test_bm25s_opens_our_arrays(peer, paths):
    import bm25s

    theirs, numbers = peer[1:]
    opened = bm25s.BM25()
    names = {"data_name": paths.scores.name, "indices_name": paths.postings.name, "indptr_name": paths.starts.name}
    opened.load_scores(paths.scores.parent, **names, num_docs=500, mmap=True)
    opened.nonoccurrence_array = None
    for place, word in enumerate(sorted(filter(None, numbers))):  # bm25s adds an empty word
        np.testing.assert_allclose(
            opened.get_scores_from_ids([place]), theirs.get_scores_from_ids([numbers[word]]), rtol=1e-5
        )


def test_rows_are_scored_in_the_order_given_and_without_a_common_word_as_0(paths):
    index = build(["red apple", "green pear", "red pear red"], paths)
    scores = index.scores("red", np.array([2, 1, 0]))
    assert scores[0] > scores[2] > scores[1] == 0
    assert index.search("blue", 5)[1].tolist() == index.search("", 5)[1].tolist() == []
    assert index.search("RED", 5)[1].tolist() == [2, 0]
    assert 0 < scores.max() < index.rarest


@pytest.mark.parametrize("texts", [[""], ["...", "the"]])
def test_texts_without_words_can_be_indexed_and_find_nothing(paths, texts):
    index = build(texts, paths)
    assert len(index.search("the apple", 5)[1]) == 0
    assert index.scores("apple", np.arange(len(texts))).tolist() == [0.0] * len(texts)


def test_a_pasted_page_is_searched_by_its_rarest_words(paths):
    texts = [f"word{n} " * 2 + "all" for n in range(200)]
    index = build(texts, paths)
    assert len(index.search(" ".join(texts), 500)[1]) == 64


def test_the_temporary_file_is_removed(paths, monkeypatch):
    build(made_texts(20), paths)
    assert not paths.scores.with_name("spill").exists()
    monkeypatch.setattr(sparse, "tokenize", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(["a"], paths)
    assert not paths.scores.with_name("spill").exists()


def test_disk_space_is_allocated_before_an_array_is_mapped(tmp_path):
    array = sparse._create(tmp_path / "array.npy", np.dtype("<f4"), 1_000_000)
    assert (tmp_path / "array.npy").stat().st_blocks * 512 >= array.nbytes == 4_000_000
    array[-1] = 5
    array.flush()
    assert np.load(tmp_path / "array.npy", allow_pickle=False)[-1] == 5


@pytest.mark.parametrize("name", ["scores", "postings", "starts", "words"])
def test_a_cut_or_foreign_file_is_refused_by_name(paths, name):
    texts = made_texts(50)
    record = sparse.build(texts, paths, rows=50, temporary=paths.scores.with_name("spill"))
    path = getattr(paths, name)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no index at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.name):
            Sparse(paths, record, 50)
    if name != "words":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        with pytest.raises(UserError, match=f"{path.name} cannot be read"):
            Sparse(paths, record, 50)
