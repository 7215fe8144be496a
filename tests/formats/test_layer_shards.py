"""Prepared folders (`layer_shards`, `shard_writer`, `legacy`): read, resumed; missing, cut, altered, foreign files."""

import json
import re

import pytest
import tiny_shards
import torch
from tiny_shards import GPTJ, NEOX, equal, flip

from openchatkit.errors import UserError
from openchatkit.formats import config_file, layer_shards, legacy, shard_writer
from openchatkit.formats.layer_shards import LayerShards, folder_name
from openchatkit.formats.manifest import DamagedError
from openchatkit.models.registry import config_from_hf, family

AGAIN = "run the same prepare command again, it writes only what is missing$"


@pytest.fixture
def prepared(tmp_path):
    folder = tmp_path / "org_model"
    tiny_shards.write_prepared(folder)
    return folder


@pytest.mark.parametrize("raw", [NEOX, GPTJ, {**NEOX, "tie_word_embeddings": True}], ids=["neox", "gptj", "tied"])
def test_what_was_written_is_read(tmp_path, raw):
    made = tiny_shards.write_prepared(tmp_path / "m", raw)
    shards = LayerShards.open(tmp_path / "m")
    shards.verify()
    assert shards.raw_config == raw
    assert shards.config == config_from_hf(raw)
    assert shards.shards == ["embed", "layer_00000", "layer_00001", "layer_00002", "head"]
    assert all(equal(shards.read(shard), tensors) for shard, tensors in made.items())
    kind = family(shards.config)
    assert (kind.tied_weight in shards.read("head")) is not shards.config.tie_embeddings


def test_one_tensor_of_a_shard(prepared):
    read = LayerShards.open(prepared).read("layer_00001", names=["mlp.dense_h_to_4h.bias"])
    assert {name: tuple(t.shape) for name, t in read.items()} == {"mlp.dense_h_to_4h.bias": (16,)}


def test_no_such_folder(tmp_path):
    message = (
        f"{tmp_path}/x is not a prepared model: no such folder; run `python pretrained/GPT-NeoX-20B/prepare.py "
        "--model-name MODEL` and pass the folder it names"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        LayerShards.open(tmp_path / "x")


def test_an_empty_folder_and_a_file(tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        LayerShards.open(tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="it is a file"):
        LayerShards.open(tmp_path / "f")


def test_a_hugging_face_folder_says_how_to_prepare_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEOX))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=rf"found config.json, model.safetensors; run .* --model-name {tmp_path}`"):
        LayerShards.open(tmp_path)


def test_a_missing_shard_is_named_at_once(prepared):
    (prepared / "layer_00001.safetensors").unlink()
    with pytest.raises(DamagedError, match=rf"layer_00001\.safetensors is missing; {AGAIN}"):
        LayerShards.open(prepared)


def test_a_cut_shard_is_named_at_once(prepared):
    path = prepared / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=rf"head\.safetensors has [\d,]+ bytes, the manifest says .*; {AGAIN}"):
        LayerShards.open(prepared)


@pytest.mark.parametrize("position", [0, 9, 200, -1])
def test_an_altered_shard_is_found_by_verify(prepared, position):
    flip(prepared / "embed.safetensors", position, bit=3)
    shards = LayerShards.open(prepared)
    shards.verify(["layer_00000", "head"])
    with pytest.raises(DamagedError, match=rf"embed\.safetensors was altered: .*; {AGAIN}"):
        shards.verify(["embed"])
    with pytest.raises(DamagedError, match="embed"):
        shards.verify()


def test_two_shards_that_changed_places(prepared):
    a, b = prepared / "layer_00000.safetensors", prepared / "layer_00001.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(DamagedError, match="layer_00000"):
        LayerShards.open(prepared).verify(["layer_00000"])


def test_a_shard_the_manifest_does_not_know(prepared):
    raw = json.loads((prepared / "config.json").read_text())
    # As long as before, so that only the number of layers betrays it.
    (prepared / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 4}))
    with pytest.raises(DamagedError, match=r"layer_00003\.safetensors is not listed"):
        LayerShards.open(prepared)


def test_an_unfinished_preparation(prepared):
    config = config_from_hf(NEOX)
    shard_writer.ShardWriter(prepared, config, source=prepared, about={"another": "source"})
    with pytest.raises(UserError, match=f"preparing this model was not finished; {AGAIN}"):
        LayerShards.open(prepared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lacks": "attention.dense.bias"}, "layer_00000 lacks attention.dense.bias; expected 12 tensors, found 11"),
        ({"holds": "attention.extra"}, "layer_00000 holds attention.extra, which a gpt_neox model"),
        (
            {"bends": "mlp.dense_4h_to_h.bias"},
            r"mlp.dense_4h_to_h.bias of layer_00000 is \[9\], config.json says \[8\]",
        ),
    ],
    ids=["missing", "left over", "shape"],
)
def test_a_shard_that_does_not_fit_its_config(tmp_path, monkeypatch, change, message):
    made = tiny_shards.weights(NEOX)
    tensors = made["layer_00000"]
    tensors.pop(change.get("lacks"), None)
    if "holds" in change:
        tensors[change["holds"]] = torch.ones(1)
    if "bends" in change:
        tensors[change["bends"]] = torch.ones(9)
    monkeypatch.setattr(tiny_shards, "weights", lambda *a, **k: made)
    tiny_shards.write_prepared(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        LayerShards.open(tmp_path / "m").read("layer_00000")


def test_remote_code_is_refused(prepared):
    (prepared / "config.json").write_text(json.dumps({**NEOX, "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(UserError, match=r"names code to download and run \(auto_map\)"):
        LayerShards.open(prepared)


@pytest.mark.parametrize(("content", "message"), [("[]", "is not a JSON object"), ("{", "cannot read .*config.json")])
def test_a_broken_config(prepared, content, message):
    (prepared / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        LayerShards.open(prepared)


def write_original(folder, raw, *, dtype=torch.float16):
    """The original kit's prepared folder, with the buffers it stores."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    made = tiny_shards.weights(raw)
    for shard, tensors in made.items():
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        if shard.startswith("layer"):
            attention = "attention" if raw["model_type"] == "gpt_neox" else "attn"
            stored |= {
                f"{attention}.bias": torch.ones(1, 1, 4, 4).bool(),
                f"{attention}.masked_bias": torch.tensor(-1e9),
            }
        torch.save(stored, folder / legacy.shard_file(shard))
    return made


@pytest.mark.parametrize("raw", [NEOX, GPTJ], ids=["neox", "gptj"])
def test_the_original_s_shards_are_read(tmp_path, raw):
    made = write_original(tmp_path / "old", raw)
    assert (tmp_path / "old" / "pytorch_embs.pt").exists()
    assert (tmp_path / "old" / "pytorch_0.pt").exists()
    assert (tmp_path / "old" / "pytorch_lm_head.pt").exists()
    shards = LayerShards.open(tmp_path / "old")
    shards.verify()
    for shard, tensors in made.items():
        assert equal(shards.read(shard), {name: tensor.half() for name, tensor in tensors.items()})


def test_a_missing_shard_of_the_original(tmp_path):
    write_original(tmp_path / "old", NEOX)
    (tmp_path / "old" / "pytorch_1.pt").unlink()
    with pytest.raises(UserError, match=r"pytorch_1\.pt is missing; 1 of 5 shards are"):
        LayerShards.open(tmp_path / "old")


def test_an_offloaded_shard_of_the_original_holds_no_data(tmp_path):
    write_original(tmp_path / "old", NEOX)
    path = tmp_path / "old" / "pytorch_2.pt"
    torch.save({name: tensor.to("meta") for name, tensor in tiny_shards.weights(NEOX)["layer_00002"].items()}, path)
    with pytest.raises(
        DamagedError, match=r"pytorch_2\.pt holds the shape but not the data of .*; prepare the model again"
    ):
        LayerShards.open(tmp_path / "old").read("layer_00002")


def test_has_tokenizer(prepared):
    assert not LayerShards.open(prepared).has_tokenizer
    (prepared / "tokenizer.json").write_text("{}")
    assert LayerShards.open(prepared).has_tokenizer


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("EleutherAI/gpt-neox-20b", "EleutherAI_gpt-neox-20b"),
        ("togethercomputer/RedPajama-INCITE-Base-3B-v1", "togethercomputer_RedPajama-INCITE-Base-3B-v1"),
        ("/data/models/mine", "mine"),
        ("./mine/", "mine"),
        ("some/where/mine", "mine"),
        ("../mine", "mine"),
    ],
)
def test_folder_name(name, folder):
    assert folder_name(name) == folder


def test_a_kill_at_any_shard_and_the_next_run_goes_on(tmp_path, monkeypatch):
    """Everything written before the kill is kept, nothing half written is, and the result is the same bytes."""
    tiny_shards.write_prepared(tmp_path / "whole")
    real = shard_writer.write_stream
    for killed_at in range(5):
        written = []

        def write(path, *args, killed_at=killed_at, written=written, **kwargs):
            if len(written) == killed_at:
                (path.parent / f".{path.name}.half.tmp").write_bytes(b"half")
                raise KeyboardInterrupt
            written.append(path.name)
            return real(path, *args, **kwargs)

        folder = tmp_path / f"killed_{killed_at}"
        monkeypatch.setattr(shard_writer, "write_stream", write)
        with pytest.raises(KeyboardInterrupt):
            tiny_shards.write_prepared(folder)
        before, written[:] = list(written), []
        monkeypatch.setattr(
            shard_writer, "write_stream", lambda p, *a, w=written, **k: w.append(p.name) or real(p, *a, **k)
        )
        tiny_shards.write_prepared(folder)
        assert len(before) == killed_at
        assert not set(before) & set(written)
        assert len(before) + len(written) == 5
        contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert contents == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_a_second_run_writes_only_what_was_damaged(prepared):
    flip(prepared / "layer_00001.safetensors")
    (prepared / "head.safetensors").unlink()
    writer = shard_writer.ShardWriter(prepared, config_from_hf(NEOX), source=prepared, about={"seed": 0})
    assert writer.done == {"embed", "layer_00000", "layer_00002"}
    assert not writer.complete


def test_a_whole_folder_has_nothing_to_do(prepared):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert shard_writer.ShardWriter(prepared, config_from_hf(NEOX), source=prepared, about={"seed": 0}).complete
    assert before == {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    LayerShards.open(prepared)


def test_an_altered_small_file_is_mended(prepared):
    (prepared / "config.json").write_text("{}")
    tiny_shards.write_prepared(prepared)
    LayerShards.open(prepared).verify()


def test_another_source_starts_over(prepared):
    assert not shard_writer.ShardWriter(prepared, config_from_hf(NEOX), source=prepared, about={"seed": 1}).done


def test_shards_of_a_deeper_model_go(prepared):
    tiny_shards.write_prepared(prepared, {**NEOX, "num_hidden_layers": 2}, seed=1)
    assert not (prepared / "layer_00002.safetensors").exists()
    LayerShards.open(prepared).verify()


def test_names_on_disk():
    assert layer_shards.shard_file("layer_00012") == "layer_00012.safetensors"
    assert legacy.shard_file("layer_00012") == "pytorch_12.pt"


def test_a_model_whose_weights_start_at_random_is_a_config_alone(tmp_path):
    folder = tmp_path / "new"
    config_file.write_raw(folder, NEOX)
    assert LayerShards.open(folder, weights=False).config.num_layers == NEOX["num_hidden_layers"]
    with pytest.raises(UserError, match="is not a prepared model"):
        LayerShards.open(folder)
