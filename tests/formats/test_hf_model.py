"""Hugging Face folders (`hf_model`, `pickled`) in every form, without transformers; pickles with code; damage."""

import json
import os

import pytest
import tiny_shards
import torch
from safetensors.torch import save_file
from tiny_shards import NEOX

from openchatkit.errors import UserError
from openchatkit.formats import hf_model, tensor_file
from openchatkit.formats.hf_model import HFModel
from openchatkit.formats.manifest import DamagedError
from openchatkit.models.registry import config_from_hf, family

AGAIN = "; fetch or copy the model again$"


def state_dict(raw=NEOX):
    kind = family(config_from_hf(raw))
    return {kind.hf_key(s, name): t for s, tensors in tiny_shards.weights(raw).items() for name, t in tensors.items()}


def write(folder, form, tensors):
    """Write a model's folder: `form` is safetensors, bin, old_bin, and either of the first three in shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NEOX))
    end = "bin" if "bin" in form else "safetensors"
    base = "pytorch_model" if end == "bin" else "model"

    def save(part, path):
        if end == "bin":
            torch.save(part, path, _use_new_zipfile_serialization="old" not in form)
        else:
            save_file(part, path, metadata={"format": "pt"})

    if "sharded" not in form:
        save(tensors, folder / f"{base}.{end}")
        return folder
    weight_map = {}
    for number in range(3):
        part = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i * 3 // len(tensors) == number}
        name = f"{base}-{number + 1:05d}-of-00003.{end}"
        weight_map.update(dict.fromkeys(part, name))
        save(part, folder / name)
    (folder / f"{base}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FORMS = ["safetensors", "bin", "old_bin", "sharded safetensors", "sharded bin", "sharded old_bin"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form, monkeypatch):
    monkeypatch.setattr("openchatkit.formats.pickled.CHUNK", 64)
    tensors = state_dict()
    tensors["gpt_neox.embed_in.weight"] = tensors["gpt_neox.embed_in.weight"].half()
    model = HFModel(write(tmp_path / "m", form, tensors))
    assert model.config == config_from_hf(NEOX)
    assert model.specs.keys() == tensors.keys()
    assert model.one_by_one is ("old" in form)
    for key in model.specs:
        assert model.specs[key].dtype == tensors[key].dtype
        assert torch.equal(model.read(key), tensors[key])
        assert b"".join(map(bytes, model.chunks(key))) == bytes(tensor_file.tensor_bytes(tensors[key]))
    assert len(model.files) == (3 if "sharded" in form else 1)


def test_pickled_tensors_that_are_not_contiguous(tmp_path):
    tensors = state_dict()
    key = "gpt_neox.embed_in.weight"
    expected = tensors[key]
    tensors[key] = tensors[key].T.contiguous().T
    model = HFModel(write(tmp_path / "m", "bin", tensors))
    assert b"".join(map(bytes, model.chunks(key))) == bytes(tensor_file.tensor_bytes(expected))
    assert torch.equal(model.read(key), expected)


def test_safetensors_win_over_pickles(tmp_path):
    folder = write(tmp_path / "m", "sharded safetensors", state_dict())
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert HFModel(folder).files[0] == "model-00001-of-00003.safetensors"


def test_no_config(tmp_path):
    with pytest.raises(UserError, match=r"is not a model: config\.json is missing; pass a hub name or a folder"):
        HFModel(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEOX))
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(
        UserError, match=r"holds no weights: expected .* or the index of either, found config\.json, model"
    ):
        HFModel(tmp_path)


def test_remote_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**NEOX, "auto_map": {}}))
    with pytest.raises(UserError, match="auto_map"):
        HFModel(tmp_path)


def test_an_unknown_family(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type is 'llama'; the kit knows gpt_neox, gptj"):
        HFModel(tmp_path)


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_a_missing_and_a_cut_file(tmp_path, form):
    folder = write(tmp_path / "m", form, state_dict())
    path = next(folder.glob("*model-00002*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DamagedError, match=f"{path.name} is not a whole .*{AGAIN}"):
        HFModel(folder)
    path.unlink()
    with pytest.raises(DamagedError, match=f"{path.name} is missing{AGAIN}"):
        HFModel(folder)


def test_an_index_that_promises_too_much(tmp_path):
    folder = write(tmp_path / "m", "sharded safetensors", state_dict())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["gpt_neox.more"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=f"lacks gpt_neox.more, which the index promises{AGAIN}"):
        HFModel(folder)


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": []}, {"weight_map": {"a": "../../x"}}, {"weight_map": {"a": 1}}]
)
def test_an_index_that_is_none(tmp_path, content):
    folder = write(tmp_path / "m", "sharded safetensors", state_dict())
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=f"has no weight_map of plain file names{AGAIN}"):
        HFModel(folder)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_something_runs_nothing(tmp_path, new_format):
    folder = write(tmp_path / "m", "bin", state_dict())
    payload = {"w": Hostile(tmp_path / "ran")}
    torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        DamagedError, match="holds more than tensors, and nothing else in it is loaded; look for a safe"
    ):
        HFModel(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.ones(2)])
def test_a_pickle_of_something_else(tmp_path, content):
    folder = write(tmp_path / "m", "bin", state_dict())
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(DamagedError, match="holds something else than tensors by name"):
        HFModel(folder)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip"])
def test_no_pickle_at_all(tmp_path, content):
    folder = write(tmp_path / "m", "bin", state_dict())
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(DamagedError, match=r"is not a whole file of torch\.save; fetch or copy it again"):
        HFModel(folder)


def test_fetch_takes_a_folder_as_it_is(tmp_path):
    assert hf_model.fetch(str(tmp_path)) == tmp_path
