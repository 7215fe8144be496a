"""Inspecting and comparing the tensors of models of every kind of folder."""

import json
import math
import re

import pytest
import tiny_shards
import torch
from safetensors.torch import save_file

from openchatkit.convert import to_hf, to_neox
from openchatkit.tools.checkpoint_inspection import find_largest_difference, main, measure

RAW = {**tiny_shards.NEOX, "num_attention_heads": 2}
LINE = re.compile(r" *(\S+) +(\S+) +(\S+) +(\d+) +(\d+)  (\S+) +(\S+) (\[.*\])")


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """The same weights as a checkpoint, as GPT-NeoX's, and as Hugging Face's; and others as layer shards."""
    root = tmp_path_factory.mktemp("folders")
    raw = {**RAW, "vocab_size": 384}
    tiny_shards.write_checkpoint(root / "run", 7, raw, tokenizer=tiny_tokenizer)
    tiny_shards.write_prepared(root / "shards", raw)
    to_neox.convert(root / "run", root / "neox", ranks=2)
    to_hf.convert(root / "run", root / "hf")
    return root


@pytest.mark.parametrize("kind", ["run", "neox", "hf"])
def test_every_tensor_is_shown_with_its_numbers(folders, kind, capsys):
    made = tiny_shards.weights({**RAW, "vocab_size": 384}, seed=7)
    assert run(folders / kind) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {match[7]: match for line in lines if (match := LINE.fullmatch(line))}
    everything = [tensor for tensors in made.values() for tensor in tensors.values()]
    numbers = sum(tensor.numel() for tensor in everything)
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in everything))
    assert lines[-1].startswith(
        f"{len(everything)} tensors, {numbers:,} numbers, {4 * numbers:,} bytes, norm {norm:.5g}"
    )
    weight = made["layer_00001"]["mlp.dense_h_to_4h.weight"]
    line = shown["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    assert line.groups()[3:] == ("0", "0", "float32", line[7], str(list(weight.shape)))
    for text, value in zip(line.groups()[:3], (weight.norm(), weight.min(), weight.max()), strict=True):
        assert math.isclose(float(text), float(value), rel_tol=1e-4)


@pytest.mark.parametrize("kind", ["neox", "hf"])
def test_conversions_do_not_differ(folders, kind, capsys):
    assert run(folders / "run", folders / kind) == 0
    assert capsys.readouterr().out.endswith("tensors, none of which differs\n")


def test_models_that_differ(folders, capsys):
    assert run(folders / "run", folders / "shards", "--only", "*embed_in*") == 1
    made = [tiny_shards.weights({**RAW, "vocab_size": 384}, seed=seed)["embed"]["embed_in.weight"] for seed in (7, 0)]
    apart = float((made[0].double() - made[1].double()).abs().max())
    expected = f"gpt_neox.embed_in.weight: differs by up to {apart:.5g}\n1 of 1 tensors differ\n"
    assert capsys.readouterr().out == expected
    assert run(folders / "run", folders / "shards", "--only", "*embed_in*", "--tolerance", apart) == 0


def write_other(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "another"}))
    return folder


def test_a_network_that_the_kit_does_not_know(tmp_path, capsys):
    first = write_other(tmp_path / "a", {"x": torch.tensor([1.0, math.nan, math.inf]), "y": torch.ones(2, 2)})
    second = write_other(
        tmp_path / "b", {"x": torch.tensor([1.0, math.nan, 2.0]), "y": torch.ones(4), "z": torch.ones(1)}
    )
    assert run(first) == 0
    lines = capsys.readouterr().out.splitlines()
    assert LINE.fullmatch(lines[1]).groups() == ("1", "1", "1", "1", "1", "float32", "x", "[3]")
    assert lines[-1].endswith("1 NaN, 1 infinite")
    assert run(first, second) == 1
    assert capsys.readouterr().out.splitlines() == [
        "x: differs by up to inf",
        "y: [2, 2] and [4]",
        f"z: in {second} alone",
        "3 of 3 tensors differ",
    ]


def test_pieces_add_up(monkeypatch):
    monkeypatch.setattr("openchatkit.tools.checkpoint_inspection._CHUNK", 7)
    tensor = torch.randn(5, 9).half()
    one = measure(tensor)
    assert math.isclose(one.norm, float(tensor.double().norm()), rel_tol=1e-12)
    assert (one.least, one.greatest) == (float(tensor.min()), float(tensor.max()))
    other = tensor.clone()
    other[3, 3] += 1
    assert find_largest_difference(tensor, other) == float((other.double() - tensor.double()).abs().max())
    assert find_largest_difference(tensor, tensor.clone()) == 0


def test_what_is_no_model(tmp_path, folders, capsys):
    assert run(tmp_path / "no") == 2
    assert "holds no model" in capsys.readouterr().err
    assert run(folders / "shards", "--only", "nothing") == 2
    assert "holds no tensor like nothing" in capsys.readouterr().err
