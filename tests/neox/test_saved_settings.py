"""Settings beside a checkpoint: the same defaults as those of configurations to train by, from every kind of file."""

import contextlib
import json
from dataclasses import replace

import pytest
from neox_cases import SHIPPED

from openchatkit.errors import UserError
from openchatkit.formats import neox_settings
from openchatkit.formats.neox_saved_settings import DEFAULTS, SavedSettings
from openchatkit.formats.neox_writer import describe_settings
from openchatkit.models.registry import config_from_hf
from openchatkit.neox.config import NeoxConfig
from openchatkit.neox.keys import KEYS
from openchatkit.neox.model import pad_vocabulary

MODEL = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16}


class Recorder(SavedSettings):
    def __init__(self, given):
        self._given, self.source, self.asked = dict(given), "here", set()

    def get(self, name):
        self.asked.add(name)
        return super().get(name)


def test_defaults_are_those_of_the_configurations():
    assert {name: KEYS[name].default for name in DEFAULTS} == DEFAULTS
    asked = set()
    for settings in [*SHIPPED.values(), MODEL | {"norm": "rmsnorm"}, MODEL | {"norm": "scalenorm", "pos_emb": "rpe"}]:
        recorder = Recorder(MODEL | {name: value for name, value in settings.items() if name in KEYS})
        with contextlib.suppress(UserError):  # of networks that are not here
            neox_settings.describe_model(recorder, rows=128)
        asked |= recorder.asked
    assert len(asked) > 25
    assert {name for name in asked - DEFAULTS.keys() if KEYS[name].default is not None} == set()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "gpt_neox", "use_parallel_residual": False, "hidden_act": "gelu_fast", "rotary_pct": 0.5},
        {
            "hidden_act": "swiglu",
            "norm": "rmsnorm",
            "num_kv_heads": 1,
            "use_bias_in_mlp": False,
            "attention_bias": False,
        },
        {"pos_emb": "rpe", "norm": "scalenorm", "use_qk_layernorm": True, "hidden_dropout": 0.1},
        {
            "pos_emb": "alibi",
            "attention_config": ["local", "global"],
            "gpt_j_tied": True,
            "use_parallel_residual": True,
        },
        {"pos_emb": "none", "sliding_window_width": 4, "gpt_j_tied": True, "use_parallel_residual": True},
    ],
)
def test_settings_that_are_written_are_keys_of_gpt_neox_and_mean_the_model(tmp_path, options):
    sizes = {"vocab_size": 512, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    raw = {"model_type": "neox", **sizes, "intermediate_size": 32, "max_position_embeddings": 16} | options
    model = config_from_hf(raw)
    write(
        tmp_path / "model.yml",
        describe_settings(model, ranks=1, pipeline=True) | {"tokenizer_type": "CharLevelTokenizer"},
    )
    config = NeoxConfig.read([str(tmp_path / "model.yml")])
    config.check()
    again = config_from_hf(neox_settings.describe_model(config, rows=pad_vocabulary(257, divisor=512, parts=1)))
    initial = {"init_std", "output_init_std", "init_method", "output_init_method"}
    different = {key: value for key, value in vars(again).items() if value != vars(model)[key] and key not in initial}
    assert {key: value for key, value in different.items() if key != "options"} == {}
    assert again.options == replace(model.options, sparsity_config=again.options.sparsity_config)


def write(path, settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "place", ["global_step1/configs/a.yml", "configs/a.yml", "configs/a.json", "global_step1/a.yaml", "a.json"]
)
def test_files_are_found_in_and_beside_the_checkpoint(tmp_path, place):
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "list.json").write_text("[]")
    write(tmp_path / place, {"num-layers": 3, "rotary_pct": "2.5e-1", "norm": "apexlayernorm", "num_kv_heads": None})
    found = SavedSettings(tmp_path / "global_step1", blocks=3)
    assert [found.get(name) for name in ("num_layers", "rotary_pct", "norm", "num_kv_heads", "pos_emb")] == [
        3,
        0.25,
        "layernorm",
        None,
        "learned",
    ]
    assert found.source == str(tmp_path / place)
    assert found.where("norm") == f"{tmp_path / place}: norm apexlayernorm"
    assert found.where("pos_emb") == f"{tmp_path / place}: pos_emb is not given, by default learned"


def test_the_tokenizer_is_found_where_the_folder_is_now(tmp_path, tiny_tokenizer):
    steps = tmp_path / "global_step1"
    steps.mkdir()
    write(steps / "configs" / "a.yml", MODEL | {"tokenizer_type": "HFTokenizer", "vocab_file": "/gone/tokens.json"})
    assert SavedSettings(steps, blocks=2).load_tokenizer() is None
    (tmp_path / "tokens.json").write_bytes((tiny_tokenizer / "tokenizer.json").read_bytes())
    assert SavedSettings(steps, blocks=2).load_tokenizer().end_of_text == 0
    write(steps / "configs" / "a.yml", MODEL | {"tokenizer_type": "CharLevelTokenizer", "vocab_file": "/gone/x"})
    assert SavedSettings(steps, blocks=2).load_tokenizer().vocab_size == 512
    write(steps / "configs" / "a.yml", MODEL | {"tokenizer_type": "OtherTokenizer"})
    assert SavedSettings(steps, blocks=2).load_tokenizer() is None
