"""The model of a configuration: its sizes as published, the spread of its weights, its tokenizer."""

import json
import math

import pytest
import torch
from neox_cases import SHIPPED

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import config_file, neox_settings
from openchatkit.models.registry import config_from_hf
from openchatkit.models.stage import Stage
from openchatkit.neox import model
from openchatkit.neox.config import NeoxConfig

# Rows of published embeddings: by the tokenizer's ids, tensor ranks and the divisor.
PUBLISHED = [(50277, 1, 50304), (50277, 2, 50432), (50277, 4, 50688), (50257, 1, 50304), (32000, 1, 32000)]


@pytest.mark.parametrize(("ids", "parts", "rows"), PUBLISHED)
def test_the_vocabulary_is_padded_as_published_models_are(ids, parts, rows):
    assert model.pad_vocabulary(ids, divisor=1 if ids == 32000 else 128, parts=parts) == rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Of https://huggingface.co/EleutherAI/pythia-160m and -1b, but for the activation's form.
        (
            "configs/pythia/160M.yml",
            {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "rotary_pct": 0.25},
        ),
        (
            "configs/pythia/1B.yml",
            {"hidden_size": 2048, "num_attention_heads": 8, "use_parallel_residual": True, "hidden_act": "gelu_fast"},
        ),
        (
            "configs2021/small.yml",
            {"rotary_pct": 1.0, "use_parallel_residual": False, "hidden_act": "gelu", "tie_word_embeddings": False},
        ),
    ],
)
def test_config_json(name, expected, write):
    config = NeoxConfig.read([str(write("c.yml", SHIPPED[name]))])
    raw = model.make_config(config, 50277)
    assert expected.items() <= raw.items()
    assert raw["vocab_size"] == 50304
    assert config_from_hf(raw).num_layers == raw["num_hidden_layers"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"model_type": "gpt_neox", "layer_norm_eps": 1e-5}),
        # What is of no effect is no option.
        ({"num_kv_heads": 4, "gpt_j_tied": True}, {"model_type": "gpt_neox"}),
        ({"activation": "mish"}, {"model_type": "gpt_neox", "hidden_act": "mish"}),
        ({"activation": "softsign"}, {"model_type": "neox", "hidden_act": "softsign"}),
        ({"gpt_j_residual": True, "gpt_j_tied": True}, {"model_type": "neox", "gpt_j_tied": True}),
        ({"norm": "rmsnorm", "layernorm_epsilon": 0.5}, {"norm": "rmsnorm", "norm_eps": 1e-8}),
        ({"norm": "rmsnorm_2021", "rms_norm_epsilon": "1e-6"}, {"norm": "rmsnorm_2021", "norm_eps": 1e-6}),
        ({"norm": "scalenorm", "scalenorm_epsilon": 0.1}, {"norm": "scalenorm", "norm_eps": 0.1}),
        ({"norm": "non_parametric_layernorm", "layernorm_epsilon": 0.5}, {"norm_eps": 0.5}),
        ({"num_kv_heads": 2, "use_bias_in_mlp": False}, {"num_kv_heads": 2, "use_bias_in_mlp": False}),
        # LLaMA's own widths: of 7B, whose intermediate_size GPT-NeoX's rule makes of 32768, and of 2021's geglu.
        ({"activation": "swiglu", "intermediate_size": 32768, "mlp_multiple_of": 256}, {"intermediate_size": 11008}),
        ({"activation": "geglu", "intermediate_size": 8 * 32}, {"intermediate_size": 8 * 32 // 3}),
        ({"activation": "glu", "expansion_factor": 6}, {"intermediate_size": 64}),
        ({"pos_emb": None}, {"pos_emb": "learned", "rotary_pct": 1.0}),
        ({"pos_emb": "alibi", "rpe_num_buckets": 8}, {"pos_emb": "alibi", "rpe_num_buckets": 32}),
        ({"pos_emb": "rpe", "rpe_num_buckets": 8}, {"rpe_num_buckets": 8, "rpe_max_distance": 128, "rpe_scaled": True}),
        ({"pos_emb": "rpe", "rpe_rule": "2021"}, {"rpe_scaled": False}),
        ({"hidden_dropout": "1e-1"}, {"model_type": "neox", "hidden_dropout": 0.1, "attention_dropout": 0.0}),
        ({"sliding_window_width": 8}, {"sliding_window_width": 8}),
        ({"sparsity": "interspersed", "seed": 7}, {"attention_config": ["global", "sparse_variable"] * 2}),
        ({"sparsity": "all", "seed": 7}, {"attention_config": ["sparse_variable"] * 4, "sparsity_config": {"seed": 7}}),
        (SHIPPED["configs2021/sparse.yml"], {"sparsity_config": {"block": 16, "num_local_blocks": 32, "seed": 1234}}),
        # Of no sparse layer.
        ({"sparsity_config": {"block": 8}, "attention_config": [[["flash"], 4]]}, {"model_type": "gpt_neox"}),
        ({"activation": "reglu", "intermediate_size": 126}, {"intermediate_size": 42, "hidden_act": "reglu"}),
        ({"activation": "geglu", "intermediate_size": 126, "bias_gelu_fusion": True}, {"hidden_act": "geglu"}),
    ],
)
def test_options(configure, settings, expected):
    config = configure(**settings)
    config.check()
    raw = model.make_config(config, 512)
    assert expected.items() <= raw.items()
    assert config_from_hf(raw).intermediate_size == raw["intermediate_size"]


def test_initialisations_that_are_no_normal_distribution(configure):
    settings = {"init_method": "orthogonal", "output_layer_init_method": "scaled_orthogonal"}
    read = config_from_hf(model.make_config(configure(**settings), 512))
    assert (read.init_method, read.output_init_method) == ("orthogonal", "orthogonal")
    assert (read.init_std, read.output_init_std) == pytest.approx((math.sqrt(2), math.sqrt(2 / 4)))
    settings = {"init_method": "xavier_uniform", "output_layer_init_method": "wang_init"}
    read = config_from_hf(model.make_config(configure(**settings), 512))
    assert (read.init_method, read.output_init_method) == ("xavier_uniform", "normal")
    assert (read.init_std, read.output_init_std) == pytest.approx((1.0, 2 / 4 / math.sqrt(32)))
    read = config_from_hf(model.make_config(configure(output_layer_init_method="xavier_normal"), 512))
    assert (read.init_method, read.output_init_method, read.init_std) == ("normal", "xavier_normal", 0.02)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("normal", 0.03),
        ("scaled_normal", 0.03 / math.sqrt(8)),
        ("single_residual_scaled_normal", 0.03 / 2),
        ("small_init", math.sqrt(2 / 5 / 96)),
        ("wang_init", 2 / 4 / math.sqrt(96)),
    ],
)
def test_initial_weights_have_the_spread_of_their_method(configure, name, std):
    for key in ("init_method", "output_layer_init_method"):
        settings = {"init_method": "normal", "output_layer_init_method": "normal", "init_method_std": 0.03} | {
            key: name
        }
        raw = model.make_config(configure(hidden_size=96, no_weight_tying=True, **settings), 512)
        stage = Stage(config_from_hf(raw))
        stage.init_weights(seed=1)
        outputs = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
        drawn = {name: weight for name, weight in stage.named_parameters() if weight.dim() > 1}
        for weight_name, weight in drawn.items():
            is_output = weight_name.endswith(outputs)
            expected = std if is_output == (key == "output_layer_init_method") else 0.03
            torch.testing.assert_close(weight.std().item(), expected, rtol=0.06, atol=0)


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ([[["flash"], 4]], ["flash"] * 4),
        ([[["global", "flash"], "all"]], ["global", "flash"] * 2),
        ([[["global"], 3], [["flash"], 1]], ["global"] * 3 + ["flash"]),
        (["global", "flash", "flash", "global"], ["global", "flash", "flash", "global"]),
        ([[["local", "global"], "all"]], ["local", "global"] * 2),
        ([[["bigbird"], 2], [["local", "flash"], 1]], ["bigbird", "bigbird", "local", "flash"]),
    ],
)
def test_attention_kinds(configure, given, kinds):
    assert neox_settings.expand_attention(configure(attention_config=given), 4) == kinds
    plain = ["global" if kind == "flash" else kind for kind in kinds]
    assert neox_settings.choose_attention(configure(attention_config=given), 4) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_config": [[["global"], 3]]}, r"attention_config .* it is of 3 layers, num_layers is 4"),
        ({"attention_config": [[["a", "b", "c"], "all"]]}, r"num_layers 4 is no multiple of 3 kinds"),
        ({"attention_config": [[["mamba"], 4]]}, r"mamba: another architecture"),
        ({"attention_config": [["global", 4]]}, r"expected entries such as"),
        ({"attention_config": [[["local"], 4]], "sparsity": "all"}, r"sparsity all: attention_config says the same"),
        ({"sparsity": "all", "sparsity_config": {"blocks": 8}}, r"^sparsity_config: blocks is not known; the settings"),
        ({"sparsity": "all", "sliding_window_width": 8}, r"^sliding_window_width is of layers with global attention"),
        ({"hidden_dropout": 1.5}, r"^hidden_dropout is 1.5, expected a number of at least 0 and below 1"),
        ({"pos_emb": "rpe", "rpe_num_buckets": 9}, r"^rpe_num_buckets is 9, expected an even number"),
        ({"attention_config": [[["global"], "some"]]}, r'expected a number of times, or "all"'),
        ({"num_kv_heads": 3}, r"c.yml:\d+: num_kv_heads 3: num_attention_heads 4 is no multiple of it"),
        (
            {"num_kv_heads": 2, "use_qk_layernorm": True},
            r"use_qk_layernorm True: one norm serves queries and keys, of which num_kv_heads 2 makes fewer",
        ),
        ({"mlp_multiple_of": 4}, r"mlp_multiple_of 4: it is for gated activations: leave it out"),
        ({"mlp_multiple_of": 0, "activation": "geglu"}, r"mlp_multiple_of 0: expected at least 1"),
        (
            # mistral/7B.yml
            {"activation": "swiglu", "intermediate_size": 14336},
            r"c.yml:\d+: activation swiglu with intermediate_size 14336: GPT-NeoX's first matrix has two halves of "
            r"4,779 rows, its second 4,778 columns: use intermediate_size 14337",
        ),
        ({"hidden_size": 30}, r"hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"num_layers": None}, r"num_layers is missing in .*c.yml: a model needs num_layers"),
        ({"hidden_size": 0}, r"hidden_size 0: expected at least 1"),
    ],
)
def test_models_that_cannot_be(configure, settings, message):
    with pytest.raises(UserError, match=message):
        model.make_config(configure(**settings), 512)


def test_the_folder_that_training_starts_from(configure, tmp_path, tiny_tokenizer):
    folder = tmp_path / "save" / "model"
    config = configure(vocab_file="data/gpt2-vocab.json")  # which is not there: characters need no file
    model.write_model(folder, config, resumes=False)
    raw = config_file.read_raw(folder)
    assert (raw["vocab_size"], raw["eos_token_id"]) == (512, 0)
    assert Tokenizer(folder).encode(["ab"]) == [[97, 98]]
    # A tokenizer of its own replaces it, and pads with end-of-text where it has nothing else.
    plain = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    plain["added_tokens"] = plain["added_tokens"][:1]
    plain["model"]["vocab"] = {name: id for name, id in plain["model"]["vocab"].items() if name != "<|padding|>"}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    library = configure(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "plain.json"))
    model.write_model(folder, library, resumes=False)
    assert Tokenizer(folder).padding == Tokenizer(folder).end_of_text == 0


def test_a_resumed_run_keeps_the_rows_of_its_embedding(configure, tmp_path):
    folder = tmp_path / "model"
    settings = {"make_vocab_size_divisible_by": 100}
    model.write_model(folder, configure(model_parallel_size=4, **settings), resumes=False)
    assert config_file.read_raw(folder)["vocab_size"] == 800
    model.write_model(folder, configure(**settings), resumes=True)
    assert config_file.read_raw(folder)["vocab_size"] == 800
    model.write_model(folder, configure(**settings), resumes=False)
    assert config_file.read_raw(folder)["vocab_size"] == 600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_type": None, "vocab_file": "no.json"}, r"GPT2BPETokenizer needs --merge-file"),
        (
            {"tokenizer_type": None, "vocab_file": "no.json", "merge_file": "no.txt"},
            r"GPT2BPETokenizer: there is no no.json",
        ),
        ({"tokenizer_type": "HFTokenizer"}, r"HFTokenizer needs --vocab-file: a tokenizer.json"),
    ],
)
def test_tokenizers_that_are_not_there(configure, settings, message):
    with pytest.raises(UserError, match=message):
        model.load_tokenizer(configure(**settings))
