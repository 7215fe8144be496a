"""Reading and merging of configuration files: what GPT-NeoX's files mean, and a line for each mistake in them."""

import json
import re
from pathlib import Path

import pytest
from neox_cases import SHIPPED, in_yaml

from openchatkit.errors import UserError
from openchatkit.neox import files, keys
from openchatkit.neox.config import NeoxConfig


def read(*paths: Path, **overrides: str) -> dict[str, object]:
    return {name: given.value for name, given in files.read_settings(list(map(str, paths)), None, overrides).items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_read_as_gpt_neox_reads_them(name, write):
    settings = {key: value for key, value in SHIPPED[name].items() if key != "attention_type"}
    renamed = {{"save_interval": "checkpoint_factor"}.get(key, key): value for key, value in settings.items()}
    for path in (write("a.yml", in_yaml(settings)), write("a.json", json.dumps(settings))):
        found = read(path)
        assert found.keys() == renamed.keys()
        # Values that nobody reads may stay texts.
        assert [key for key in found if found[key] != renamed[key] and keys.KEYS[key].kind != "any"] == []


def test_files_are_merged_and_the_command_line_wins(write):
    write("conf/a.yml", {"num_layers": 12, "lr_decay_style": "cosine"})
    write("conf/b.yml", {"hidden_size": 768})
    config = NeoxConfig.read(
        ["a", "b.yml"], folder=write("conf/c.json", "{}").parent, overrides={"lr-decay-style": "linear", "seed": "7"}
    )
    assert (config.get("num_layers"), config.get("hidden_size"), config.get("seed")) == (12, 768, 7)
    assert config.where("lr_decay_style") == "--lr_decay_style linear"
    assert config.where("num_layers").endswith("conf/a.yml:2: num_layers 12")
    assert [path.name for path in config.files] == ["a.yml", "b.yml"]


def test_values_are_read_in_the_kind_of_their_key(write):
    text = """{
      "optimizer": {"type": "adam", "params": {"lr": 1e-4, "betas": [0.9, 9.5e-1], "eps": "1e-8"}},
      "warmup": 1e-2, "rotary-pct": 1, "train-iters": 1e3, "norm": "LayerNorm", "no_weight_tying": True,
      "train_data_paths": "a_store", "seed": null,
    }"""
    assert read(write("a.yml", text)) == {
        "optimizer": {"type": "adam", "params": {"lr": 0.0001, "betas": [0.9, 0.95], "eps": 1e-8}},
        "warmup": 0.01,
        "rotary_pct": 1,
        "train_iters": 1000,
        "norm": "layernorm",
        "no_weight_tying": True,
        "train_data_paths": ["a_store"],
        "seed": None,
    }


def test_spellings_of_2021(configure):
    config = configure(save_interval=500, norm="apexlayernorm", fp16={"type": "bfloat16", "enabled": False})
    assert config.get("checkpoint_factor") == 500
    assert config.get("norm") == "layernorm"
    assert config.precision == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "float32"),
        ({"precision": "fp16"}, "float16"),
        ({"precision": "bfloat16", "bf16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": True}}, "float16"),
        ({"fp16": {"enabled": False}}, "float32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
    ],
)
def test_precisions(configure, settings, precision):
    assert configure(**settings).precision == precision


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"num_layers": 12,\n"num-layers": 6}', r"a.yml:2: 'num-layers' is also in line 1: leave one out"),
        ('{"fp16": {"enabled": true,\n"enabled": false}}', r"a.yml:2: 'enabled' is also in line 1: leave one out"),
        ('{"save_interval": 2,\n"checkpoint_factor": 3}', r"a.yml:2: checkpoint_factor is also in .*a.yml:1: leave"),
        ('{\n\t"num_layers": 12}', r"a.yml:2: there is a tab: YAML takes spaces alone, replace it"),
        (
            '{"num_layers": 12,\n"hidden_sise": 6}',
            r"a.yml:2: .* no setting 'hidden_sise': the nearest is 'hidden_size'",
        ),
        (
            '{"zero_optimization":\n{"stages": 1}}',
            r"a.yml:1: zero_optimization: .* no setting 'stages': the nearest is 'stage'",
        ),
        ('{"num_layers": twelve}', r"a.yml:1: num_layers is 'twelve': expected a whole number"),
        ('{"num_layers": 1.5}', r"a.yml:1: num_layers is 1.5: expected a whole number"),
        ('{"num_layers": true}', r"a.yml:1: num_layers is True: expected a whole number"),
        ('{"warmup": .nan}', r"a.yml:1: warmup is nan: expected a number"),
        ('{"norm": "groupnorm"}', r"a.yml:1: norm is 'groupnorm': expected one of layernorm, "),
        ('{"no_weight_tying": "maybe"}', r"a.yml:1: no_weight_tying is 'maybe': expected true or false"),
        ('{"fp16": true}', r"a.yml:1: fp16 is True: expected a block of settings"),
        ('{"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}', r"a.yml:1: optimizer.params.lr is 'fast': expec"),
        ('{"attention_config": "global"}', r"a.yml:1: attention_config is 'global': expected a list"),
        ('{"num_layers": 12', r"a.yml:1 is not YAML: "),
        ("[1, 2]", r"a.yml: expected settings such as .* found something else"),
        ("{? [a]: 1}", r"a.yml:1: .* no setting"),
        ('{"num_layers": 12,\n"num_layers": 6}', r"a.json:2: 'num_layers' is there twice: leave one out"),
        ('{"num_layers": 12,\n}', r"a.json:\d is not JSON: "),
        ('{"seed": 1,\n"num_layres": 6}', r"a.json:2: .* no setting 'num_layres': the nearest is 'num_layers'"),
        ("[]", r"a.json: expected settings"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_line(write, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(write(re.match(r"a\.\w+", message)[0], content))
    assert "\n" not in str(caught.value)


def test_mistakes_between_files(write, tmp_path):
    one, two = write("one.yml", {"num_layers": 12}), write("two.yml", {"seed": 1, "num_layers": 6})
    with pytest.raises(UserError, match=r"two.yml:3: num_layers is also in .*one.yml:2: leave one out"):
        read(one, two)
    with pytest.raises(UserError, match=rf"{tmp_path}/x/one.yml and {one} have one name"):
        read(one, write("x/one.yml", {"seed": 1}))
    with pytest.raises(UserError, match=rf"three.yml: there is no such configuration file: {tmp_path} has .*one.yml"):
        read(tmp_path / "three")
    with pytest.raises(UserError, match=r"nowhere is no folder"):
        read(tmp_path / "nowhere" / "a")
    with pytest.raises(UserError, match=r"--seed is 'x': expected|--seed: seed is 'x': expected a whole number"):
        read(one, seed="x")
    (tmp_path / "latin.yml").write_bytes(b'{"save": "\xe9"}')
    with pytest.raises(UserError, match=r"latin.yml is not UTF-8"):
        read(tmp_path / "latin")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16", "bf16": {"enabled": True}}, r"precision fp16 says float16, .* says bfloat16: make them"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, r"says float16, .* says bfloat16: make them agree"),
    ],
)
def test_precisions_that_disagree(configure, settings, message):
    with pytest.raises(UserError, match=message):
        _ = configure(**settings).precision


def test_what_is_not_followed_is_said_once(configure):
    settings = {"no_save_optim": True, "wall_clock_breakdown": True, "data_impl": "mmap"}
    ignored, different = configure(**settings).check()
    assert ignored == "without effect here: data_impl, wall_clock_breakdown (docs/neox.md says why)"
    assert re.match(r"\S+c.yml:\d+: no_save_optim True: the optimizer's state is saved with", different)
    with pytest.raises(UserError, match=r"c.yml:\d+: opt_pos_emb_offset 2: the first token has the first row"):
        configure(opt_pos_emb_offset=2).check()
    with pytest.raises(UserError, match=r"c.yml:\d+: optimizer.params.weight_decay 0.1: the key weight_decay says it"):
        configure(optimizer={"type": "Adam", "params": {"weight_decay": 0.1}}).check()
