"""Encoders: vectors of texts, records, and refused folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import make_encoder

from openchatkit.errors import UserError
from openchatkit.retrieval.encoder import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "cosine")


def test_texts_with_the_same_words_are_near_each_other(folder):
    texts = ["old cat of the garden", "cat in an old garden", "salt water", "bread from the oven " * 9]
    done = []
    vectors = Encoder(folder).encode(texts, progress=done.append)
    assert vectors.shape == (4, 32)
    assert vectors.dtype == np.float32
    assert sum(done) == 4
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near = vectors @ vectors.T
    assert near[0, 1] > 0.5 > near[0, 2]
    # Sorting by length and padding change nothing.
    np.testing.assert_allclose(Encoder(folder).encode(texts[2:3])[0], vectors[2], atol=1e-6)


def test_no_text_gives_no_vector(folder):
    assert Encoder(folder).encode([]).shape == (0, 32)


def test_the_record_describes_the_encoder(folder):
    record = Encoder(folder).record()
    assert (record.name, record.dimension, record.metric) == (str(folder), 32, "cosine")
    assert (record.max_tokens, record.pooling) == (64, "mean")
    assert len(record.digest) == 64


def test_a_plain_bert_is_the_mean_over_tokens_compared_by_inner_product(tmp_path):
    encoder = Encoder(make_encoder(tmp_path / "plain", plain=True))
    assert (encoder.metric, encoder.pooling, encoder.max_tokens) == ("dot", "mean", 64)
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["red apple", "the old king and the queen"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "plain")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path / "plain")(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(encoder.encode(texts), expected.numpy(), atol=1e-5)


def test_the_prefix_of_questions_is_not_put_before_passages(tmp_path):
    folder = make_encoder(tmp_path / "asking")
    settings = {"prompts": {"query": "red wolf: ", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    encoder = Encoder(folder)
    asked, held = encoder.encode(["ice"], query=True), encoder.encode(["ice"])
    assert not np.allclose(asked, held)
    np.testing.assert_allclose(asked, encoder.encode(["red wolf: ice"]), atol=1e-6)


def test_tokens_are_counted_without_the_network(folder):
    code = f"""
import sys
from openchatkit.retrieval.encoder import Encoder
print(Encoder({str(folder)!r}).count(["the cat", "", "zz cat"]), "sentence_transformers" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[2, 0, 3] False\n"


def test_tokens_are_counted_with_only_a_vocabulary_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (tmp_path / "old" / "tokenizer.json").unlink()
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Encoder(tmp_path / "old").count(["the cat", "zz cat"]) == [2, 3]


def test_max_tokens_cuts_texts(folder):
    encoder = Encoder(folder, max_tokens=6)
    assert encoder.max_tokens == 6
    np.testing.assert_allclose(*encoder.encode(["one two three four", "one two three four five six seven"]), atol=1e-6)
    assert Encoder(folder, max_tokens=65).max_tokens == 64  # as many as the network has places for


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json", "modules.json"])
def test_a_digest_changes_with_all_that_vectors_depend_on(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "copy")
    assert Encoder(tmp_path / "copy").digest == Encoder(folder).digest
    (tmp_path / "copy" / "README.md").write_text("It says nothing that counts.", encoding="utf-8")
    assert Encoder(tmp_path / "copy").digest == Encoder(folder).digest
    with open(tmp_path / "copy" / name, "ab") as file:
        file.write(b"\n")
    assert Encoder(tmp_path / "copy").digest != Encoder(folder).digest


def test_weights_that_give_vectors_that_are_not_finite_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_encoder(tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not finite of 'ice'"):
        Encoder(folder).encode(["ice"])


def test_code_of_an_encoder_is_not_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    rows = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    rows[2]["type"] = "their.Module"
    (tmp_path / "copy" / "modules.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"names code of its own, their\.Module"):
        Encoder(tmp_path / "copy").count(["ice"])


def test_folders_without_an_encoder_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="no such folder"):
        Encoder(str(tmp_path / "nothing")).count(["ice"])
    with pytest.raises(UserError, match=r"holds no encoder: config\.json is missing"):
        Encoder(tmp_path).count(["ice"])
    shutil.copytree(folder, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / "model.safetensors", 2000)
    with pytest.raises(UserError, match=r"cannot be loaded: .*; fetch or copy it again"):
        Encoder(tmp_path / "copy", "cpu").encode(["ice"])
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: .*; fetch or copy it again"):
        Encoder(tmp_path / "copy").encode(["ice"])
    other = make_encoder(tmp_path / "other", similarity="euclidean")
    with pytest.raises(UserError, match="compares vectors by euclidean: expected an encoder for cosine or dot"):
        _ = Encoder(other).metric


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'openchatkit\[retrieval\]'"):
        Encoder(folder).encode(["ice"])


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "nonsense", ""])
def test_a_missing_device_is_named(tmp_path, device):
    folder = make_encoder(tmp_path / "encoder")
    with pytest.raises(UserError, match=f"--device {device}: there is no such device here .*: expected auto, cpu"):
        Encoder(folder, device=device).encode(["old king"])
