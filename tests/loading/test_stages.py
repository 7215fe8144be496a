"""A whole stage from each kind of folder (loading/stages.py), against transformers with the same weights."""

import json

import pytest
import torch
from test_minimal20b import IDS, gptj, neox, write_neox

from openchatkit.convert.from_hf import prepare
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.inference.loading import model_folders
from openchatkit.loading import model_kinds, stages

CPU = torch.device("cpu")
MODELS = {"neox": neox, "tied": lambda: neox(tied=True), "gptj": gptj}


def write_checkpoint(root, shards):
    temporary = checkpoint.begin(root, 7)
    records = [checkpoint.write_weights(temporary, shard, shards.read(shard)) for shard in shards.shards]
    options = {"state": {"layout": {}}, "records": records, "raw_config": shards.raw_config}
    return checkpoint.finish(temporary, root, 7, tokenizer_from=None, **options)


@pytest.fixture(params=MODELS)
def folders(request, tmp_path, tiny_tokenizer):
    """A model of transformers, and {kind: folder} of the same weights; GPT-NeoX has no checkpoints of GPT-J."""
    reference = MODELS[request.param]()
    reference.save_pretrained(tmp_path / "hf")
    prepared = prepare(str(tmp_path / "hf"), tmp_path / "prepared")
    made = {
        model_kinds.HUGGING_FACE: tmp_path / "hf",
        model_kinds.SHARDS: prepared,
        model_kinds.CHECKPOINT: write_checkpoint(tmp_path / "run", LayerShards.open(prepared)),
    }
    if request.param != "gptj":
        made[model_kinds.GPT_NEOX] = write_neox(tmp_path / "eleuther", reference)
    return reference, made


@torch.inference_mode()
def test_every_kind_of_folder_gives_the_same_network(folders):
    reference, made = folders
    expected = reference(IDS).logits
    for kind, path in made.items():
        found = model_kinds.find(path)
        assert found == model_kinds.ModelFolder(path, kind)
        stage = stages.load_stage(stages.open_shards(found), CPU)
        torch.testing.assert_close(stage.logits(stage(IDS)), expected, atol=1e-5, rtol=1e-5)
        assert not stage.training
        assert not any(parameter.requires_grad for parameter in stage.parameters())
        # As for a stage that is trained, a tied projection counts.
        tied = reference.config.tie_word_embeddings * stage.projection.weight.numel()
        counted = reference.num_parameters() if kind == model_kinds.HUGGING_FACE else reference.num_parameters() + tied
        assert stages.count_parameters(found) == counted
        half = stages.load_stage(stages.open_shards(found), CPU, torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_folder_above_means_the_latest_checkpoint(folders):
    _, made = folders
    path = made[model_kinds.CHECKPOINT]
    assert model_kinds.find(path.parent) == model_kinds.find(path)


def test_a_chat_and_an_evaluation_read_the_same_model_of_a_folder_that_holds_two(tmp_path):
    step = write_neox(tmp_path, neox())
    neox().save_pretrained(tmp_path)
    for folder, kind in ((tmp_path, model_kinds.HUGGING_FACE), (step, model_kinds.GPT_NEOX)):
        assert model_kinds.find(tmp_path) == model_folders.find_model(str(tmp_path))
        assert model_kinds.find(tmp_path) == model_kinds.ModelFolder(folder, kind)
        (tmp_path / "config.json").unlink(missing_ok=True)  # DeepSpeed's own tool leaves weights alone there


@pytest.mark.parametrize("kind", [model_kinds.SHARDS, model_kinds.CHECKPOINT])
def test_altered_bytes_are_found_if_asked_for(folders, kind):
    _, made = folders
    file = made[kind] / "layer_00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    stages.open_shards(model_kinds.find(made[kind]), verify=False)
    with pytest.raises(UserError, match=r"layer_00001\.safetensors"):
        stages.open_shards(model_kinds.find(made[kind]))


def test_folders_without_a_model(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match="holds no model: neither GPT-NeoX's layer files"):
            model_kinds.find(path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type is 'llama'"):
        model_kinds.find(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint: found no such folder"):
        model_kinds.find(tmp_path / "checkpoint_3")


def test_a_hugging_face_model_with_a_tensor_too_many_or_too_few(tmp_path):
    reference = neox()
    state = reference.state_dict()
    for change, message in (
        ({"gpt_neox.layers.0.mlp.more.weight": torch.ones(1)}, r"layer_00000 holds mlp\.more\.weight"),
        (
            {"model.layers.0.q_proj.weight": torch.ones(1)},
            "holds model.layers.0.q_proj.weight, for which a gpt_neox model of 3 layers has no place",
        ),
        ({"gpt_neox.layers.2.mlp.dense_h_to_4h.bias": None}, r"layer_00002 lacks mlp\.dense_h_to_4h\.bias"),
    ):
        changed = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        reference.save_pretrained(tmp_path, state_dict=changed)
        with pytest.raises(UserError, match=message):
            stages.load_stage(stages.open_shards(model_kinds.find(tmp_path)), CPU)
