"""Preparing models: every variant and form, resumed after kills, and one line for all that cannot be prepared."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import tiny_models
import torch
from tiny_models import NEOX, run

from openchatkit.convert import flags, from_hf
from openchatkit.convert.from_hf import prepare
from openchatkit.errors import UserError
from openchatkit.formats import shard_writer
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.registry import family


def original(model, shards):
    """A transformers model's parameters as shards."""
    kind = family(shards.config)
    made = {shard: {} for shard in shards.shards}
    for key, tensor in model.state_dict().items():
        shard, name = kind.from_hf_key(key)
        if not (shards.config.tie_embeddings and name == kind.tied_weight):
            made[shard][name] = tensor
    return made


def same_weights(shards, model, dtype=None):
    for shard, expected in original(model, shards).items():
        found = shards.read(shard)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == (dtype or tensor.dtype)
            assert torch.equal(found[name], tensor.to(dtype or tensor.dtype)), (shard, name)


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_variant_and_form(tmp_path, variant, form):
    model = tiny_models.save(tmp_path / "org" / "model", variant, form=form)
    folder = prepare(str(tmp_path / "org" / "model"), tmp_path / "out")
    assert folder == tmp_path / "out" / "model"
    shards = LayerShards.open(folder)
    shards.verify()
    same_weights(shards, model)
    assert (folder / "config.json").read_bytes() == (tmp_path / "org" / "model" / "config.json").read_bytes()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", flags.DTYPES)
def test_dtypes(tmp_path, name, form):
    model = tiny_models.save(tmp_path / "model", "neox", form=form)
    folder = prepare(str(tmp_path / "model"), tmp_path / "out", dtype=name)
    same_weights(LayerShards.open(folder), model, getattr(torch, name))


def test_a_stored_half_stays_a_half(tmp_path):
    model = tiny_models.save(tmp_path / "model", "neox", dtype=torch.bfloat16)
    same_weights(LayerShards.open(prepare(str(tmp_path / "model"), tmp_path / "out")), model)


def test_a_number_too_large_for_the_dtype(tmp_path):
    model = tiny_models.build("neox")
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.bias[3] = 1e6
    model.save_pretrained(tmp_path / "model")
    message = (
        r"gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.bias holds values up to 1e\+06, more than float16 can; convert to"
    )
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "model"), tmp_path / "out", dtype="float16")
    prepare(str(tmp_path / "model"), tmp_path / "out", dtype="bfloat16")


def test_the_tokenizer_is_copied(tmp_path, tiny_tokenizer):
    tiny_models.save(tmp_path / "model", "neox", tokenizer=tiny_tokenizer)
    shards = LayerShards.open(prepare(str(tmp_path / "model"), tmp_path / "out"))
    assert shards.has_tokenizer
    assert (shards.path / "tokenizer.json").read_bytes() == (tiny_tokenizer / "tokenizer.json").read_bytes()


def counting(monkeypatch):
    written, real = [], shard_writer.write_stream

    def write(path, *args, **kwargs):
        written.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shard_writer, "write_stream", write)
    return written


def test_a_second_run_does_only_what_is_missing(tmp_path, monkeypatch):
    tiny_models.save(tmp_path / "model", "neox")
    folder = prepare(str(tmp_path / "model"), tmp_path / "out")
    written = counting(monkeypatch)
    prepare(str(tmp_path / "model"), tmp_path / "out")
    assert written == []
    (folder / "embed.safetensors").unlink()
    cut = folder / "layer_00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    altered = bytearray((folder / "head.safetensors").read_bytes())
    altered[-1] ^= 1
    (folder / "head.safetensors").write_bytes(altered)
    prepare(str(tmp_path / "model"), tmp_path / "out")
    assert sorted(written) == ["embed.safetensors", "head.safetensors", "layer_00002.safetensors"]
    LayerShards.open(folder).verify()


def test_another_tokenizer_is_copied_and_no_shard_is_written_again(tmp_path, tiny_tokenizer, monkeypatch):
    tiny_models.save(tmp_path / "model", "neox", tokenizer=tiny_tokenizer)
    (tmp_path / "model" / "added_tokens.json").write_text("{}")
    folder = prepare(str(tmp_path / "model"), tmp_path / "out")
    text = (tiny_tokenizer / "tokenizer_config.json").read_text(encoding="utf-8")
    (tmp_path / "model" / "tokenizer_config.json").write_text(text.replace("padding", "endoftext"), encoding="utf-8")
    (tmp_path / "model" / "added_tokens.json").unlink()
    monkeypatch.setattr(shard_writer, "write_stream", None)
    prepare(str(tmp_path / "model"), tmp_path / "out")
    found = (folder / "tokenizer_config.json").read_bytes()
    assert found == (tmp_path / "model" / "tokenizer_config.json").read_bytes()
    assert not (folder / "added_tokens.json").exists()
    LayerShards.open(folder).verify()


@pytest.mark.parametrize("change", ["dtype", "weights"])
def test_another_dtype_or_other_weights_are_prepared_again(tmp_path, monkeypatch, change):
    model = tiny_models.save(tmp_path / "model", "neox")
    prepare(str(tmp_path / "model"), tmp_path / "out")
    written = counting(monkeypatch)
    if change == "weights":
        with torch.no_grad():
            model.gpt_neox.embed_in.weight.add_(1)
        model.save_pretrained(tmp_path / "model")
    folder = prepare(str(tmp_path / "model"), tmp_path / "out", dtype="float16" if change == "dtype" else None)
    assert len(written) == 7
    same_weights(LayerShards.open(folder), model, torch.float16 if change == "dtype" else None)


KILLED = """
import os, signal, sys
from openchatkit.convert import from_hf
from openchatkit.formats import tensor_file
real, left = tensor_file._pieces, [int(sys.argv[3])]
def pieces(*args):
    for piece in real(*args):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
tensor_file._pieces = pieces
from_hf.prepare(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("pieces", [1, 30, 70])
def test_a_kill_leaves_nothing_half_written_and_the_next_run_goes_on(tmp_path, monkeypatch, pieces, quick_python):
    tiny_models.save(tmp_path / "model", "neox")
    whole = prepare(str(tmp_path / "model"), tmp_path / "whole")
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), str(pieces)]
    killed = subprocess.run([quick_python, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "out" / "model"
    with pytest.raises(UserError, match="not finished; run the same prepare command again"):
        LayerShards.open(folder)
    there = {path.name for path in folder.glob("*.safetensors")}
    for name in there:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    # A shard that got its name in the very moment of the kill may miss from the journal, and is then written again.
    recorded = set(shard_writer.manifest.read(folder, name="prepare.json").files)
    assert recorded <= there
    written = counting(monkeypatch)
    prepare(str(tmp_path / "model"), tmp_path / "out")
    assert set(written) == {path.name for path in whole.glob("*.safetensors")} - recorded
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_an_error_midway_leaves_whole_shards_only(tmp_path, monkeypatch):
    tiny_models.save(tmp_path / "model", "neox")
    real = from_hf.plan_shards

    def cut_then_plan(model):
        plan = real(model)
        path = tmp_path / "model" / "model.safetensors"
        os.truncate(path, path.stat().st_size - 4)
        return plan

    monkeypatch.setattr(from_hf, "plan_shards", cut_then_plan)
    with pytest.raises(UserError, match="was cut while it was read"):
        prepare(str(tmp_path / "model"), tmp_path / "out")
    assert not list((tmp_path / "out" / "model").glob(".*"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def failing(tmp_path, capsys, *arguments, main=None):
    """Run a command that must fail; returns its one line."""
    main = main or from_hf.prepare_command(str(tmp_path / "prepare.py"), "org/default")
    assert run(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_layers_missing_left_over_or_of_another_size(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_models.save(folder, "neox")
    edit_config(folder, num_hidden_layers=6)
    line = failing(tmp_path, capsys, "--model-name", folder, "--save-dir", tmp_path / "out")
    assert "layer_00005 lacks attention.dense.bias; expected 12 tensors, found 0" in line
    edit_config(folder, num_hidden_layers=4)
    line = failing(tmp_path, capsys, "--model-name", folder, "--save-dir", tmp_path / "out")
    assert "holds gpt_neox.layers.4." in line
    assert "for which a gpt_neox model of 4 layers has no place; is config.json this model's?" in line
    edit_config(folder, num_hidden_layers=5, vocab_size=401)
    line = failing(tmp_path, capsys, "--model-name", folder, "--save-dir", tmp_path / "out")
    assert "embed_in.weight of embed is [400, 16], config.json says [401, 16]" in line
    assert not (tmp_path / "out").exists()


def test_a_foreign_tensor(tmp_path):
    model = tiny_models.build("neox")
    model.save_pretrained(tmp_path / "model", state_dict={**model.state_dict(), "adapter.weight": torch.ones(1)})
    if "adapter.weight" not in from_hf_specs(tmp_path / "model"):
        pytest.fail("transformers dropped the tensor that this test is about")
    with pytest.raises(UserError, match=r"holds adapter\.weight, for which"):
        prepare(str(tmp_path / "model"), tmp_path / "out")


def from_hf_specs(folder):
    from openchatkit.formats.hf_model import HFModel

    return HFModel(folder).specs


def test_both_names_of_the_head(tmp_path):
    tiny_models.save(tmp_path / "model", "neox", form="bin")
    stored = torch.load(tmp_path / "model" / "pytorch_model.bin")
    torch.save({**stored, "lm_head.weight": stored["embed_out.weight"]}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds lm_head\.weight, for which"):
        prepare(str(tmp_path / "model"), tmp_path / "out")


def test_quantised_weights(tmp_path):
    tiny_models.save(tmp_path / "model", "neox", form="bin")
    stored = torch.load(tmp_path / "model" / "pytorch_model.bin")
    key = "gpt_neox.layers.2.mlp.dense_h_to_4h.weight"
    torch.save({**stored, key: stored[key].to(torch.int8)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"mlp.dense_h_to_4h.weight is stored as torch.int8; a model that is not quantised"
    ):
        prepare(str(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_stored_twice(tmp_path, equal):
    model = tiny_models.save(tmp_path / "model", "neox_tied", form="bin")
    stored = torch.load(tmp_path / "model" / "pytorch_model.bin")
    stored["embed_out.weight"] = stored["gpt_neox.embed_in.weight"] + (0.0 if equal else 1.0)
    torch.save(stored, tmp_path / "model" / "pytorch_model.bin")
    if equal:
        same_weights(LayerShards.open(prepare(str(tmp_path / "model"), tmp_path / "out")), model)
    else:
        with pytest.raises(
            UserError, match=r"ties the embeddings, but embed_out\.weight differs from .*embed_in\.weight; set"
        ):
            prepare(str(tmp_path / "model"), tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding(tmp_path, tiny_tokenizer):
    tiny_models.save(tmp_path / "model", "neox", tokenizer=tiny_tokenizer)
    whole = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 400, "content": "<new>"})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(
        UserError, match=r"needs 401 embedding rows, the model has 400; use the tokenizer that the model"
    ):
        prepare(str(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(tmp_path, tiny_tokenizer, capsys, file):
    folder = tmp_path / "model"
    tiny_models.save(folder, "neox", tokenizer=tiny_tokenizer)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), "auto_map": {"A": "b.C"}}))
    line = failing(tmp_path, capsys, "--model-name", folder, "--save-dir", tmp_path / "out")
    assert f"{folder / file} names code to download and run (auto_map), which the kit never does" in line
    assert not (tmp_path / "out").exists()


def test_each_family_tool_names_the_other(tmp_path, capsys):
    tiny_models.save(tmp_path / "model", "neox")
    main = from_hf.convert_command("convert_from_hf_gptj.py", "org/default", family="gptj")
    line = failing(tmp_path, capsys, "--model-name", tmp_path / "model", "--save-dir", tmp_path / "o", main=main)
    assert line.endswith("is a gpt_neox model, gptj was expected; use tools/convert_from_hf_gptneox.py")


def test_two_runs_at_once(tmp_path):
    tiny_models.save(tmp_path / "model", "neox")
    from openchatkit.storage import own_folder

    with (
        own_folder(tmp_path / "out" / "model"),
        pytest.raises(
            UserError, match=r"another process is writing .*/out/model: wait for it, or end it and run again"
        ),
    ):
        prepare(str(tmp_path / "model"), tmp_path / "out")


def test_too_little_room(tmp_path, monkeypatch):
    tiny_models.save(tmp_path / "model", "neox")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("openchatkit.storage.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"kB are needed and .* has room for 1\.0 kB: make room or use another disk"):
        prepare(str(tmp_path / "model"), tmp_path / "out")


def test_command_line(tmp_path, monkeypatch, capsys):
    """The defaults: the script's own folder, and the model it is made for."""
    tiny_models.save(tmp_path / "org" / "default", "neox")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    main = from_hf.prepare_command(str(tmp_path / "pretrained" / "prepare.py"), "org/default")
    assert run(main, "--offload-dir", "x") == 0
    LayerShards.open(tmp_path / "pretrained" / "org_default").verify()
    error = capsys.readouterr().err
    assert "--offload-dir is not needed: the model is copied in pieces" in error
    assert f"the shards are in {tmp_path}/pretrained/org_default" in error
    main = from_hf.convert_command("convert_from_hf_gptneox.py", "org/default", family="gpt_neox")
    assert run(main) == 0
    LayerShards.open(tmp_path / "pretrained_models" / "org_default").verify()


def test_padded_vocabularies_stay_padded(tmp_path, tiny_tokenizer):
    tiny_models.save(tmp_path / "model", "neox", tokenizer=tiny_tokenizer)
    shards = LayerShards.open(prepare(str(tmp_path / "model"), tmp_path / "out"))
    assert shards.read("embed")["embed_in.weight"].shape == (NEOX["vocab_size"], NEOX["hidden_size"])
