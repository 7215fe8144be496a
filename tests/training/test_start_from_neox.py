"""Training that starts from a checkpoint of GPT-NeoX as it is."""

import ranks
from tiny_shards import equal

from openchatkit.convert import to_neox
from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import LayerShards


def test_a_run_is_that_from_layer_shards(tmp_path, flags, prepared):
    to_neox.convert(prepared["tied"], tmp_path / "neox", ranks=2)
    saved = {}
    for name, model in (("shards", prepared["tied"]), ("neox", tmp_path / "neox")):
        path = tmp_path / name / "run"
        ended = ranks.train(tmp_path / name, {**flags, "model_name": model, "checkpoint_path": path})
        assert ended.statuses == [0], ended.errors
        saved[name] = checkpoint.locate(path)
    for shard in LayerShards.open(prepared["tied"]).shards:
        weights = [checkpoint.read_weights(path, shard) for path in saved.values()]
        assert equal(*weights), shard


def test_a_folder_that_names_no_tokenizer_wants_the_flag(tmp_path, flags, prepared):
    to_neox.convert(prepared["neox"], tmp_path / "neox")
    step = tmp_path / "neox" / "global_step0"
    ended = ranks.train(tmp_path, {**flags, "model_name": step, "checkpoint_path": tmp_path / "run"})
    assert ended.statuses == [2]
    assert f"{step} holds no tokenizer: expected tokenizer.json there" in ended.errors[0]
    ended = ranks.train(
        tmp_path,
        {**flags, "model_name": step, "tokenizer_name": prepared["neox"], "checkpoint_path": tmp_path / "run"},
    )
    assert ended.statuses == [0], ended.errors
