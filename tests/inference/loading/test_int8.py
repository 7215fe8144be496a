"""The cache of int8 weights: equal to new ones, and made again if anything is wrong with it."""

import os
import shutil

import pytest
import torch
from torch import nn

from openchatkit import storage
from openchatkit.formats import hf_model, int8_cache
from openchatkit.inference.engine.linear import Int8Linear
from openchatkit.inference.loading import int8, loader
from openchatkit.libraries import pytorch
from openchatkit.loading import hardware

TOKENS = torch.arange(2, 40)[None]


@pytest.fixture
def folder(random_models, tmp_path, monkeypatch):
    """A copy of the small GPT-NeoX, whose weights are cached however small it is."""
    monkeypatch.setattr(int8, "SMALLEST", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return shutil.copytree(random_models["neox"], tmp_path / "model")


@pytest.fixture
def quantised(monkeypatch):
    """Counts the layers that are quantised rather than found."""
    made = []
    before = Int8Linear.__init__

    def counting(self, layer, **options):
        made.append(layer)
        before(self, layer, **options)

    monkeypatch.setattr(Int8Linear, "__init__", counting)
    return made


@torch.inference_mode()
def logits(folder) -> torch.Tensor:
    model = loader.load(str(folder), dtype="int8").model
    assert not [module for module in model.modules() if type(module) is nn.Linear]
    return model(TOKENS).logits


def test_weights_are_packed_where_they_can_be(folder):
    layers = [part for part in loader.load(str(folder), dtype="int8").model.modules() if isinstance(part, Int8Linear)]
    assert layers
    assert all((layer.weight is None) == pytorch.can_pack_int8() for layer in layers)


def files(chat_home) -> list:
    return sorted((chat_home / "cache").glob("*"))


def test_a_model_is_quantised_once(folder, quantised, chat_home):
    first = logits(folder)
    count = len(quantised)
    assert count
    assert len(files(chat_home)) == 1
    assert torch.equal(logits(folder), first)
    assert len(quantised) == count


def test_what_is_kept_is_mapped_where_there_is_no_room_for_copies(folder, chat_home, monkeypatch):
    logits(folder)
    monkeypatch.setattr(hardware, "available_memory", lambda: 0)
    model = loader.load(str(folder), dtype="int8").model
    with open("/proc/self/maps") as maps:
        held = [line.split()[0].split("-") for line in maps if files(chat_home)[0].name in line]
    address = model.lm_head.weight.data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in held)


@pytest.mark.parametrize("change", ["content", "time", "version", "layout"])
def test_weights_that_changed_are_quantised_again_and_the_old_ones_go(
    folder, quantised, chat_home, monkeypatch, change
):
    logits(folder)
    count, (old,) = len(quantised), files(chat_home)
    path = folder / hf_model.WEIGHTS
    if change == "content":
        state = path.stat()
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        with open(path, "r+b") as file:
            file.write(data)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "time":
        os.utime(path)
    elif change == "version":
        monkeypatch.setattr(int8_cache, "VERSION", 0)
    else:
        text = (folder / "config.json").read_text(encoding="utf-8")
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    logits(folder)
    assert len(quantised) == 2 * count
    (new,) = files(chat_home)
    assert new != old


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "a folder"])
def test_a_cache_that_cannot_be_used_is_made_again(folder, quantised, chat_home, damage):
    first = logits(folder)
    count, (path,) = len(quantised), files(chat_home)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        int8_cache.write(path, {"lm_head.weight": torch.zeros(3, dtype=torch.int8)})
    else:
        path.unlink()
        path.mkdir()
    assert torch.equal(logits(folder), first)
    assert len(quantised) == 2 * count
    logits(folder)
    assert len(quantised) == (3 if damage == "a folder" else 2) * count


@pytest.mark.parametrize("trouble", ["no place", "no room", "too small"])
def test_where_nothing_can_be_kept_the_model_loads_all_the_same(folder, quantised, chat_home, monkeypatch, trouble):
    if trouble == "no place":
        chat_home.write_text("a file", encoding="utf-8")
    elif trouble == "no room":
        monkeypatch.setattr(storage, "free_bytes", lambda folder: 1000)
    else:
        monkeypatch.setattr(int8, "SMALLEST", 10**6)
    logits(folder)
    assert quantised
    assert not files(chat_home)
