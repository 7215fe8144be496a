"""Reranking: what a cross-encoder makes of what an index has found."""

import json
import sys
from pathlib import Path

import pytest
from tiny_encoder import write_tokenizer

from openchatkit.errors import UserError
from openchatkit.retrieval.passage import Hit
from openchatkit.retrieval.rerank import Reranker

HITS = [
    Hit(text, title, id=number) for number, (text, title) in enumerate([("red fox", ""), ("sea", "T"), ("moon", "")])
]


def make(folder: Path, *, labels: int = 1) -> Path:
    """A random BERT that scores pairs."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    size = write_tokenizer(folder)
    config = BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=1.0,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_passages_come_in_the_order_of_their_scores(tmp_path):
    folder = make(tmp_path / "cross")
    found = Reranker(folder).rerank("the fox", HITS, 2)
    from sentence_transformers import CrossEncoder

    expected = CrossEncoder(str(folder)).predict([("the fox", text) for text in ("red fox", "T\nsea", "moon")])
    order = sorted(range(3), key=lambda number: -expected[number])
    assert [hit.id for hit in found] == order[:2]
    assert [hit.score for hit in found] == pytest.approx([expected[number] for number in order[:2]], rel=1e-4)
    assert found[0].text == HITS[order[0]].text
    assert Reranker(folder).rerank("the fox", [], 2) == []


def test_what_is_no_cross_encoder_is_told(tmp_path):
    with pytest.raises(UserError, match="gives 3 scores a passage: expected a cross-encoder with one"):
        Reranker(make(tmp_path / "three", labels=3)).rerank("fox", HITS, 2)
    with pytest.raises(UserError, match="no such folder"):
        Reranker(tmp_path / "nothing").rerank("fox", HITS, 2)
    folder = make(tmp_path / "damaged")
    (folder / "config.json").write_text(json.dumps({"model_type": "no such"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be loaded: .*; fetch or copy it again"):
        Reranker(folder).rerank("fox", HITS, 2)


def test_scores_that_are_no_numbers_are_told(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make(tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="scores that are not finite"):
        Reranker(folder).rerank("fox", HITS, 2)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    folder = make(tmp_path / "cross")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'openchatkit\[retrieval\]'"):
        Reranker(folder).rerank("fox", HITS, 2)
