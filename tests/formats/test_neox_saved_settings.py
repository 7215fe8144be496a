"""`formats.neox_saved_settings`: settings beside a checkpoint in any kind of file, and the advice that they give."""

import json

import pytest
import tiny_shards
import yaml

from openchatkit.convert import to_neox
from openchatkit.errors import UserError
from openchatkit.formats.neox_checkpoint import NeoXCheckpoint
from openchatkit.formats.neox_saved_settings import SavedSettings

MODEL = {
    "model_type": "neox",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
}


@pytest.fixture
def steps(tmp_path):
    """The folder of a step of GPT-NeoX with grouped queries, of two tensor ranks, and its settings."""
    tiny_shards.write_prepared(tmp_path / "shards", MODEL)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", ranks=2)
    return tmp_path / "neox" / "global_step0"


def take_settings(steps):
    """Remove the files of settings and return what they say."""
    files = [path for path in steps.parent.rglob("*") if path.suffix in (".yml", ".json")]
    said = [yaml.safe_load(path.read_text()) for path in files if path.parent.name == "configs"]
    for path in files:
        path.unlink()
    (steps.parent / "configs").mkdir(exist_ok=True)
    return said[0]


@pytest.mark.parametrize("place", ["configs", "global_step0/configs", ".", "global_step0"])
@pytest.mark.parametrize("dashes", [False, True])
def test_json_says_the_same_as_yml(steps, place, dashes):
    before = NeoXCheckpoint(steps)
    said = take_settings(steps)
    named = {name.replace("_", "-") if dashes else name: value for name, value in said.items()}
    folder = steps.parent / place
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text("\ufeff" + json.dumps(named))
    after = NeoXCheckpoint(steps)
    assert after.raw_config == before.raw_config
    assert after.config.options.num_kv_heads == 4


def test_settings_in_two_files_must_agree(steps):
    said = take_settings(steps)
    folder = steps.parent / "configs"
    (folder / "a.json").write_text(json.dumps(said))
    (folder / "b.yml").write_text(json.dumps({"seq_length": 32, "num_attention_heads": 4}))
    with pytest.raises(UserError, match=r"b\.yml says num_attention_heads: 4, another file beside it 8"):
        SavedSettings(steps, blocks=2)


@pytest.mark.parametrize("content", ["{", "[1]", '{"num_layers": '])
def test_json_that_holds_no_settings(steps, content):
    take_settings(steps)
    (steps.parent / "configs" / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        SavedSettings(steps, blocks=2)


def test_grouped_queries_are_no_reason_to_miss_shards(steps):
    """They make the first matrix of attention narrower than three times the hidden state."""
    NeoXCheckpoint(steps)
    for path in steps.glob("*model_01*"):
        path.unlink()
    with pytest.raises(UserError, match="holds 1 shards a layer, its tensors were cut into 2; fetch what is missing"):
        NeoXCheckpoint(steps)


def test_other_numbers_of_key_heads_are_named(steps):
    said = take_settings(steps)
    (steps.parent / "configs" / "a.json").write_text(json.dumps(said | {"num_kv_heads": 3}))
    with pytest.raises(UserError, match=r"num_kv_heads 3: num_attention_heads 8 is no multiple of it"):
        NeoXCheckpoint(steps)
    (steps.parent / "configs" / "a.json").write_text(json.dumps(said | {"num_kv_heads": 2}))
    with pytest.raises(UserError, match=r"query_key_value.weight is \[32, 16\], .* makes it \[24, 16\]"):
        NeoXCheckpoint(steps).read("layer_00000")
