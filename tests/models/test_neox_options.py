"""The family `neox` (models/neox.py): each of its options against formulas in float64, cut in all ways, and cached."""

import dataclasses
import json
import math
import re

import pytest
import torch
from model_configs import FAMILIES

from openchatkit.errors import UserError
from openchatkit.models.cuts import Part, check_parts, cut_shard, join_shard
from openchatkit.models.layers import RotaryTable
from openchatkit.models.neox_options import NORMS, NeoxOptions, read_options
from openchatkit.models.norms import make_norm
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.stage import Stage
from openchatkit.models.views import LayerView
from openchatkit.paths import ROOT

RAW = FAMILIES["neox"] | {
    "model_type": "neox",
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "rotary_pct": 0.5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "norm_eps": 0.01,  # as large as to be seen
    "initializer_range": 0.2,
}
SEQUENTIAL = {"use_parallel_residual": False}
LLAMA = {"norm": "rmsnorm", "hidden_act": "swiglu", "attention_bias": False, "use_bias_in_mlp": False, **SEQUENTIAL}
CASES = {
    "plain": {},
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm of 2021": {"norm": "rmsnorm_2021", **SEQUENTIAL},
    "scalenorm": {"norm": "scalenorm"},
    "no parameters": {"norm": "non_parametric_layernorm", **SEQUENTIAL},
    "one norm": {"gpt_j_tied": True},
    "query-key layernorm": {"use_qk_layernorm": True},
    "query-key rmsnorm": {"use_qk_layernorm": True, "norm": "rmsnorm"},
    "query-key rmsnorm of 2021": {"use_qk_layernorm": True, "norm": "rmsnorm_2021"},
    "query-key scalenorm": {"use_qk_layernorm": True, "norm": "scalenorm", **SEQUENTIAL},
    "query-key norm without parameters": {"use_qk_layernorm": True, "norm": "non_parametric_layernorm"},
    "two heads of keys": {"num_kv_heads": 2},
    "one head of keys": {"num_kv_heads": 1, **SEQUENTIAL},
    "no biases": {"attention_bias": False, "use_bias_in_mlp": False},
    "tanh gelu": {"hidden_act": "gelu_fast", "use_bias_in_mlp": False},
    "relu": {"hidden_act": "relu", "gpt_j_tied": True},
    "softsign": {"hidden_act": "softsign"},
    "swish": {"hidden_act": "swish", "norm": "rmsnorm"},
    "mish": {"hidden_act": "mish"},
    "geglu": {"hidden_act": "geglu"},
    "reglu": {"hidden_act": "reglu", "use_bias_in_mlp": False},
    "swiglu": {"hidden_act": "swiglu"},
    "glu": {"hidden_act": "glu"},
    "bilinear": {"hidden_act": "bilinear"},
    "llama": LLAMA | {"num_kv_heads": 2},
    "tied": {"tie_word_embeddings": True, "norm": "rmsnorm"},
}
# Between them all pieces that are cut or added up over parts.
CUT = ["llama", "query-key rmsnorm", "query-key scalenorm", "geglu", "one norm", "rmsnorm of 2021", "tied"]
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
NUMBERS = {"rtol": 0, "atol": 1e-11}


def config_of(case, **changes):
    return config_from_hf(RAW | CASES[case] | changes)


def make(case, **options):
    """The whole network in float64, with norms and biases that are not what they start as."""
    stage = Stage(config_of(case), **options).double()
    stage.init_weights(0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return stage


# The network in formulas: of one row, with the parameters of a shard by name.


def normed(x, kind, parameters, name, *, eps=RAW["norm_eps"]):
    if "layernorm" in kind:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return y * parameters[f"{name}.weight"] + parameters[f"{name}.bias"] if kind == "layernorm" else y
    square = (x * x).mean(-1, keepdim=True)
    if kind == "rmsnorm":
        return x / (square + eps).sqrt() * parameters[f"{name}.scale"]
    if kind == "rmsnorm_2021":
        return x / (square.sqrt() + eps) * parameters[f"{name}.scale"]
    length = (x * x).sum(-1, keepdim=True).sqrt()
    return x / torch.where(length > eps, length, eps) * parameters[f"{name}.g"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


FORMULAS = {
    "gelu": gelu,
    "gelu_fast": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "softsign": lambda x: x / (1 + x.abs()),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "geglu": gelu,
    "reglu": lambda x: x * (x > 0),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
    "bilinear": lambda x: x,
}


def linear(x, parameters, name):
    y = x @ parameters[f"{name}.weight"].T
    return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y


def rotate(x, dimensions):
    """Of one head, [length, width]: pairs j and j + dimensions / 2, by an angle that grows with the place."""
    half = dimensions // 2
    angles = torch.arange(len(x)).unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
    angles = angles.float().double()  # the tables are of float32
    cos, sin = (each.float().double() for each in (angles.float().cos(), angles.float().sin()))
    first, second, rest = x[:, :half], x[:, half:dimensions], x[:, dimensions:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], 1)


def attention(x, settings, parameters):
    mixed, width, heads = linear(x, parameters, "attention.query_key_value"), 8, 4
    groups = settings.get("num_kv_heads") or heads
    if groups == heads:
        triples = mixed.view(len(x), heads, 3, width)
        query, key, value = (triples[:, :, number] for number in range(3))
    else:
        query = mixed[:, : heads * width].reshape(len(x), heads, width)
        key, value = mixed[:, heads * width :].reshape(len(x), 2, groups, width).unbind(1)
    if settings.get("use_qk_layernorm"):
        kind, name = settings.get("norm", "layernorm"), "attention.qk_layernorm"
        if "layernorm" in kind:
            query, key = (normed(each.flatten(1), kind, parameters, name).view_as(each) for each in (query, key))
        else:
            numbers = {key: p for key, p in parameters.items() if key.startswith(name)}
            if kind != "scalenorm":
                numbers[f"{name}.scale"] = numbers[f"{name}.scale"].view(heads, width)
            query, key = (normed(each, kind, numbers, name) for each in (query, key))
    later = torch.ones(len(x), len(x)).triu(1).bool()
    mixed = []
    for head in range(heads):
        of = head * groups // heads
        scores = rotate(query[:, head], 4) @ rotate(key[:, of], 4).T / math.sqrt(width)
        weights = torch.exp(scores.masked_fill(later, -torch.inf))
        mixed.append(weights / weights.sum(1, keepdim=True) @ value[:, of])
    return linear(torch.cat(mixed, 1), parameters, "attention.dense")


def mlp(x, settings, parameters):
    inner, activation = linear(x, parameters, "mlp.dense_h_to_4h"), settings.get("hidden_act", "gelu")
    if activation in ("geglu", "reglu", "swiglu", "glu", "bilinear"):
        inner = inner[:, :48] * FORMULAS[activation](inner[:, 48:])
    else:
        inner = FORMULAS[activation](inner)
    return linear(inner, parameters, "mlp.dense_4h_to_h")


def logits_of_row(tokens, settings, shards):
    kind = settings.get("norm", "layernorm")
    x = shards["embed"]["embed_in.weight"][tokens]
    for number in range(2):
        layer = shards[f"layer_{number:05d}"]
        first = normed(x, kind, layer, "input_layernorm")
        attended = attention(first, settings, layer)
        if settings["use_parallel_residual"]:
            second = first if settings.get("gpt_j_tied") else normed(x, kind, layer, "post_attention_layernorm")
            x = x + attended + mlp(second, settings, layer)
        else:
            x = x + attended
            x = x + mlp(normed(x, kind, layer, "post_attention_layernorm"), settings, layer)
    return normed(x, kind, shards["head"], "final_layer_norm") @ shards["head"]["embed_out.weight"].T


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_formulas(case):
    stage = make(case)
    logits = stage.logits(stage(TOKENS))
    shards = {
        shard: {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        for shard, module in stage.named_shards()
    }
    expected = torch.stack([logits_of_row(row, RAW | CASES[case], shards) for row in TOKENS])
    torch.testing.assert_close(logits, expected, **NUMBERS)
    for each in (logits, expected):
        each.square().mean().backward()
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            assert parameter.grad.abs().sum() > 0, (shard, name)
            torch.testing.assert_close(parameter.grad, shards[shard][name].grad, **NUMBERS)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_nothing_are_nothing_and_of_half_precision_are_exact_to_it(kind, dtype):
    norm = make_norm(kind, 32, 1e-8)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    x[1] = 0
    x.requires_grad_()
    found = norm(x)
    found.float().sum().backward()
    assert found.dtype == dtype
    assert found[1].abs().max() == 0
    assert torch.isfinite(x.grad).all()
    parameters = {f"n.{name}": parameter.double() for name, parameter in norm.named_parameters()}
    expected = normed(x[:1].double(), kind, parameters, "n", eps=1e-8)
    torch.testing.assert_close(found[:1].double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_shard_stores_what_the_network_has_and_says_how_it_is_cut(case):
    config = config_of(case)
    with torch.device("meta"):
        stage = Stage(config)
    for shard, module in stage.named_shards():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        assert shapes.keys() <= family(config).cuts(config).keys()
        # By which optimizers know what does not decay.
        assert {name for name, shape in shapes.items() if len(shape) == 1} == {
            name for name in shapes if "norm" in name or name.endswith(".bias")
        }
        stored = family(config).parameter_shapes(config, shard)
        left_out = {"embed_out.weight"} if shard == HEAD and config.tie_embeddings else set()
        assert stored == {name: shape for name, shape in shapes.items() if name not in left_out}
        for name in shapes:
            assert family(config).from_hf_key(family(config).hf_key(shard, name)) == (shard, name)


@pytest.mark.parametrize("case", CASES)
def test_two_stages_have_the_bits_of_one(case):
    config = config_of(case)
    whole, halves = Stage(config), [Stage(config, 0, 1, head=False), Stage(config, 1, 2, embed=False)]
    for stage in (whole, *halves):
        stage.init_weights(3)
    for stages in ([whole], halves):
        x = TOKENS
        for stage in stages:
            x = stage(x)
        stages[-1].logits(x).square().mean().backward()
    for stage in halves:
        for shard, module in stage.named_shards():
            for name, parameter in module.named_parameters():
                other = whole.shards[shard].get_parameter(name)
                assert torch.equal(parameter, other)
                assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("case", ["llama", "one head of keys", "query-key rmsnorm", "one norm"])
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 5], [5, 1, 1, 5]], ids=str)
@torch.inference_mode()
def test_pieces_with_a_cache_give_the_logits_of_the_whole(case, pieces):
    stage = make(case)
    cache = stage.new_cache(2, 16)
    assert cache[0].content.shape[2] == stage.config.num_key_heads
    found = torch.cat([stage(piece, cache=cache) for piece in TOKENS.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, stage(TOKENS), **NUMBERS)


@pytest.mark.parametrize("case", ["llama", "query-key scalenorm"])
def test_documents_of_a_row_are_read_as_each_by_itself(case):
    stage = make(case)
    starts = torch.tensor([[0] * 5 + [5] * 7, [0] * 12])
    found, other = stage(TOKENS, starts), stage(TOKENS[:1, 5:])
    torch.testing.assert_close(found[:1, 5:], other, **NUMBERS)
    torch.testing.assert_close(found[1:], stage(TOKENS[1:]), **NUMBERS)


@pytest.mark.parametrize("case", CUT)
@pytest.mark.parametrize("selective", [False, True])
def test_recomputed_layers_have_the_same_bits(case, selective):
    found = []
    for options in ({}, {"recompute": True, "selective": selective}):
        stage = Stage(config_of(case), **options)
        stage.init_weights(3)
        stage.logits(stage(TOKENS)).square().mean().backward()
        found.append([parameter.grad for parameter in stage.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# Parts. Results of a layer's branches are added up where its seams would do that.


def layer_of_parts(parts, x, cos, sin):
    """What a tensor group's layers compute together."""
    one = parts[0]
    normeds = [part.input_layernorm(x) for part in parts]
    attended = sum(part.attention(y, cos, sin, LayerView()) for part, y in zip(parts, normeds, strict=True))
    if not one.parallel_residual:
        x = x + attended
    if one.post_attention_layernorm is not None:
        normeds = [part.post_attention_layernorm(x) for part in parts]
    inner = sum(part.mlp(y) for part, y in zip(parts, normeds, strict=True))
    return x + attended + inner if one.parallel_residual else x + inner


@pytest.mark.parametrize("case", CUT)
def test_parts_compute_the_whole_and_their_gradients_join_to_its(case):
    config, name = config_of(case), "layer_00000"
    kind, cuts = family(config), family(config).cuts(config)
    whole = make(case).shards[name]
    x = torch.randn(2, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cos, sin = RotaryTable(config.rotary_dim, config.rotary_base)(12, torch.device("cpu"))
    parts = []
    for index in range(2):
        part = kind.module(config, name, Part(index, 2)).double()
        part.load_state_dict(cut_shard(whole.state_dict(), cuts, Part(index, 2)))
        parts.append(part)
    expected, found = whole(x, cos, sin, LayerView()), layer_of_parts(parts, x, cos, sin)
    torch.testing.assert_close(found, expected, **NUMBERS)
    for each in (expected, found):
        each.square().mean().backward()
    joined = join_shard([{key: p.grad for key, p in part.named_parameters()} for part in parts], cuts)
    for key, parameter in whole.named_parameters():
        # In each part, the gradient of what all have is a share.
        gradient = sum(part.get_parameter(key).grad for part in parts) if cuts[key] == "whole" else joined[key]
        torch.testing.assert_close(gradient, parameter.grad, **NUMBERS)


@pytest.mark.parametrize("case", CUT)
def test_parts_start_as_the_whole_does(case):
    config = config_of(case, initializer="orthogonal", output_initializer="xavier_uniform")
    cuts, whole = family(config).cuts(config), Stage(config)
    whole.init_weights(5)
    for count in (1, 2):
        parts = [Stage(config, part=Part(index, count)) for index in range(count)]
        for part in parts:
            part.init_weights(5)
        for shard in (EMBED, "layer_00001", HEAD):
            joined = join_shard([part.shards[shard].state_dict() for part in parts], cuts)
            for name, tensor in whole.shards[shard].state_dict().items():
                assert torch.equal(joined[name], tensor), name


# Settings.


@pytest.mark.parametrize("case", CASES)
def test_options_are_written_as_they_are_read(case):
    options = config_of(case).options
    assert read_options(options.to_json()) == options
    assert config_from_hf(RAW | CASES[case] | options.to_json()) == config_of(case)


def test_the_example_of_the_training_guide_is_a_model():
    section = (ROOT / "training" / "README.md").read_text(encoding="utf-8").split("## A model of your own")[1]
    raw = json.loads(section[section.index("    {") : section.index("    }") + 5])
    config = config_from_hf(raw)
    assert (config.family, config.num_key_heads, config.rotary_dim) == ("neox", 4, 64)
    table = section.split("| key of `neox` |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert {field.name for field in dataclasses.fields(NeoxOptions)} <= named
    # What the table does not name says itself what it is.
    assert raw.keys() - named == {
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    }


def test_options_of_lists_and_blocks_are_written_as_they_are_read():
    raw = {"attention_config": ["local", "global"], "sparsity_config": {"local_window_blocks": [4, 1], "block": 16}}
    assert read_options(raw).to_json() == NeoxOptions().to_json() | raw
    assert hash(read_options(raw)) == hash(read_options(raw))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batchnorm"}, "norm is 'batchnorm', expected one of layernorm, rmsnorm, "),
        ({"pos_emb": "spiral"}, "pos_emb is 'spiral', expected one of learned, "),
        ({"hidden_act": "selu"}, "hidden_act is 'selu', expected one of bilinear, geglu, "),
        ({"num_kv_heads": 3}, "4 attention heads are not a multiple of num_kv_heads 3"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0, expected a positive whole number, or null"),
        ({"num_kv_heads": 2, "use_qk_layernorm": True}, "one norm for queries and keys, of which num_kv_heads makes"),
        ({"gpt_j_tied": True, **SEQUENTIAL}, "gpt_j_tied needs use_parallel_residual"),
        ({"attention_config": ["global"]}, "attention_config is of 1 layers, the model has 2"),
        ({"attention_config": ["global", "gmlp"]}, "attention_config is 'gmlp', expected one of global, local, "),
        ({"initializer": "zeros"}, "initializer is 'zeros', expected one of normal, xavier_uniform, "),
        ({"output_initializer": "ones"}, "initializer is 'ones', expected one of normal, "),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"use_bias_in_mlp": "no"}, "use_bias_in_mlp is 'no', expected true or false"),
        ({"attention_bias": 0}, "attention_bias is 0, expected true or false"),
        ({"norm_eps": "small"}, "norm_eps is 'small', expected a number of at least 0"),
        ({"output_initializer_range": -1}, "output_initializer_range is -1, expected a number of at least 0"),
        ({"attention_config": "global"}, "attention_config is a list of a kind for each layer"),
        ({"sparsity_config": [16]}, "sparsity_config a block"),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(RAW | changes)


@pytest.mark.parametrize(
    ("case", "count", "message"),
    [
        ("two heads of keys", 4, r"--tensor-group-size 4: .*attention heads 4, key heads 2, .* give 1 or 2"),
        ("query-key layernorm", 2, r"use_qk_layernorm with layernorm is over all heads, .*: use 1, or rmsnorm"),
        ("query-key norm without parameters", 2, r"with non_parametric_layernorm is over all heads"),
    ],
)
def test_parts_that_cannot_be(case, count, message):
    check_parts(config_of(case), 1)
    with pytest.raises(UserError, match=message):
        check_parts(config_of(case), count)
