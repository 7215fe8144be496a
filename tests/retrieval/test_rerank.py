"""Reordering the hits of an index by a cross-encoder."""

import json
import sys

import pytest
from tiny_encoder import make_cross_encoder

from openchatkit.errors import UserError
from openchatkit.retrieval.passage import Hit
from openchatkit.retrieval.rerank import DEPTH, Reranked, Reranker

HITS = [
    Hit(text, title, id=number) for number, (text, title) in enumerate([("red fox", ""), ("sea", "T"), ("moon", "")])
]


def test_passages_come_in_the_order_of_their_scores(tmp_path):
    folder = make_cross_encoder(tmp_path / "cross")
    found = Reranker(folder).rerank("the fox", HITS, 2)
    from sentence_transformers import CrossEncoder

    expected = CrossEncoder(str(folder)).predict([("the fox", text) for text in ("red fox", "T\nsea", "moon")])
    order = sorted(range(3), key=lambda number: -expected[number])
    assert [hit.id for hit in found] == order[:2]
    assert [hit.score for hit in found] == pytest.approx([expected[number] for number in order[:2]], rel=1e-4)
    assert found[0].text == HITS[order[0]].text
    assert Reranker(folder).rerank("the fox", [], 2) == []


def test_reranking_starts_from_more_passages_than_k(tmp_path):
    asked = []

    class Found:
        def search(self, query, k):
            asked.append((query, k))
            return HITS[:k]

    reranker = Reranker(make_cross_encoder(tmp_path / "cross"))
    assert Reranked(Found(), reranker).search("the fox", 2) == reranker.rerank("the fox", HITS, 2)
    assert Reranked(Found(), reranker).search("the fox", DEPTH + 1) == reranker.rerank("the fox", HITS, 9)
    assert asked == [("the fox", DEPTH), ("the fox", DEPTH + 1)]


def test_folders_without_a_cross_encoder_are_refused(tmp_path):
    with pytest.raises(UserError, match="gives 3 scores a passage: expected a cross-encoder with one"):
        Reranker(make_cross_encoder(tmp_path / "three", labels=3)).rerank("fox", HITS, 2)
    with pytest.raises(UserError, match="no such folder"):
        Reranker(tmp_path / "nothing").rerank("fox", HITS, 2)
    folder = make_cross_encoder(tmp_path / "damaged")
    (folder / "config.json").write_text(json.dumps({"model_type": "no such"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be loaded: .*; fetch or copy it again"):
        Reranker(folder).rerank("fox", HITS, 2)


def test_scores_that_are_not_finite_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_cross_encoder(tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="scores that are not finite"):
        Reranker(folder).rerank("fox", HITS, 2)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    folder = make_cross_encoder(tmp_path / "cross")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'openchatkit\[retrieval\]'"):
        Reranker(folder).rerank("fox", HITS, 2)
