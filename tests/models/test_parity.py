"""Our networks against transformers': logits and gradients of small random models of every variant, in float32."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.models.layers import RotaryTable
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import shard_names
from openchatkit.models.stage import Stage

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
NEOX = {
    "pythia": {},
    "20b": {"hidden_act": "gelu_fast"},
    "redpajama": {"use_parallel_residual": False, "rotary_pct": 1.0},
    "tanh": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "mish": {"hidden_act": "mish"},
    "no_bias": {"attention_bias": False},
    "tied": {"tie_word_embeddings": True},
    "base": {"rotary_emb_base": 500.0, "layer_norm_eps": 1e-3},
}
GPTJ = {"gptj": {}, "whole_head": {"rotary_dim": 12}, "inner": {"n_inner": 100}}


def make(family_name, variant):
    torch.manual_seed(0)
    if family_name == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**TINY, **NEOX[variant]}))
    else:
        sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
        drop = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        model = GPTJForCausalLM(GPTJConfig(**{**sizes, **drop, **GPTJ[variant]}))
    # Biases start at zero and norms at one: move them, so that a missing one is seen.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def stages_of(model, *, cuts=()):
    """Our stages with the weights of a transformers model, cut before the given layers."""
    config = config_from_hf(model.config.to_dict())
    kind = family(config)
    shards = {name: {} for name in shard_names(config.num_layers)}
    for key, tensor in model.state_dict().items():
        if place := kind.from_hf_key(key):
            shards[place[0]][place[1]] = tensor.clone()
    borders = [0, *cuts, config.num_layers]
    stages = []
    for first, last in itertools.pairwise(borders):
        stage = Stage(config, first, last, embed=first == 0, head=last == config.num_layers)
        for shard in stage.shards:
            stage.load(shard, shards[shard])
        stages.append(stage)
    return stages


def through(stages, tokens, document_starts=None):
    """Logits of a model cut into stages."""
    x = tokens
    for stage in stages:
        x = stage(x, document_starts)
    return stages[-1].logits(x)


def assert_same_gradients(model, stages):
    """The gradients of our stages' parameters are those of the transformers model's."""
    kind = family(stages[0].config)
    grads = {}
    for stage in stages:
        for shard, module in stage.named_shards():
            for name, parameter in module.named_parameters():
                grads[shard, name] = parameter.grad
    if stages[0].config.tie_embeddings:
        grads["embed", kind.embedding_weight] += grads.pop(("head", kind.tied_weight))
    compared = 0
    for key, parameter in model.named_parameters():
        ours = grads[kind.from_hf_key(key)]
        assert torch.allclose(ours, parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max().item()), key
        compared += 1
    assert compared == len(grads)


def variants():
    return [("gpt_neox", name) for name in NEOX] + [("gptj", name) for name in GPTJ]


@pytest.mark.parametrize(("family_name", "variant"), variants())
@pytest.mark.parametrize("cuts", [(), (1,), (1, 2)])
def test_logits_and_gradients(family_name, variant, cuts):
    model = make(family_name, variant)
    tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).logits
    stages = stages_of(model, cuts=cuts)
    logits = through(stages, tokens)
    assert (logits - expected).abs().max() < 1e-4

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    assert_same_gradients(model, stages)


# Documents by length in each row; what is left of it is padding, each token a document of its own.
PACKED = ((13, 1, 11), (33,), (6, 20))


def starts_of(rows, length):
    """The place at which each token's document begins, int64 [len(rows), length]."""
    starts = torch.arange(length).repeat(len(rows), 1)
    for row, sizes in enumerate(rows):
        for first, last in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
            starts[row, first:last] = first
    return starts


@pytest.mark.parametrize(
    ("family_name", "variant"), [("gpt_neox", "pythia"), ("gpt_neox", "redpajama"), ("gptj", "gptj")]
)
@pytest.mark.parametrize("cuts", [(), (1, 2)])
def test_documents_that_share_a_row_do_not_see_each_other(family_name, variant, cuts):
    """Per document the logits, and over all of them the gradients, of transformers on each document alone."""
    model = make(family_name, variant)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (len(PACKED), 33), generator=generator)
    weight = torch.randn((*tokens.shape, 96), generator=generator)
    stages = stages_of(model, cuts=cuts)
    logits = through(stages, tokens, starts_of(PACKED, 33))
    trained = 0.0
    for row, sizes in enumerate(PACKED):
        for first, last in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
            expected = model(tokens[row : row + 1, first:last]).logits[0]
            assert (logits[row, first:last] - expected).abs().max() < 1e-4, (row, first)
            (expected * weight[row, first:last]).sum().backward()
            trained = trained + (logits[row, first:last] * weight[row, first:last]).sum()
    trained.backward()
    assert_same_gradients(model, stages)


def test_one_document_a_row_is_plain_causal_attention():
    (stage,) = stages_of(make("gpt_neox", "pythia"))
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(stage(tokens, torch.zeros_like(tokens)), stage(tokens), rtol=0, atol=1e-5)
    assert not torch.allclose(stage(tokens, starts_of([(9, 11), (20,)], 20))[0], stage(tokens)[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("starts", [None, starts_of([(9, 11), (17,)], 20)], ids=["whole", "packed"])
@pytest.mark.parametrize(("family_name", "variant"), [("gpt_neox", "pythia"), ("gptj", "gptj")])
def test_recomputing_changes_no_bit(family_name, variant, starts):
    model = make(family_name, variant)
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    found = []
    for recompute in (False, True):
        (stage,) = stages_of(model)
        stage.recompute = recompute
        stage.logits(stage(tokens, starts)).square().mean().backward()
        found.append([p.grad for p in stage.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_another_device_is_given_the_table_that_the_cpu_computed():
    """On the meta device, where values cannot be compared, by the operations: all that arrives there is a copy."""

    class Arrivals(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and result.device.type == "meta":
                copied.append(args[0].clone())
            else:
                assert result.device.type == "cpu" or func is torch.ops.aten.slice.Tensor, func
            return result

    copied = []
    table = RotaryTable(16, 10000.0)
    with Arrivals():
        found = table(40, torch.device("meta"))
    assert all(part.device.type == "meta" and part.shape == (40, 8) for part in found)
    assert all(torch.equal(*pair) for pair in zip(copied, table(40, torch.device("cpu")), strict=True))


@pytest.mark.parametrize(("family_name", "variant"), variants())
def test_keys_and_shapes_map_both_ways(family_name, variant):
    model = make(family_name, variant)
    config = config_from_hf(model.config.to_dict())
    kind = family(config)
    state = {k: v for k, v in model.state_dict().items() if kind.from_hf_key(k)}
    listed = {}
    for shard in shard_names(config.num_layers):
        for name, shape in kind.parameter_shapes(config, shard).items():
            key = kind.hf_key(shard, name)
            assert kind.from_hf_key(key) == (shard, name)
            listed[key.replace("embed_out", "lm_head")] = shape
    if config.tie_embeddings:
        state.pop("lm_head.weight")
    assert listed == {key: tuple(tensor.shape) for key, tensor in state.items()}


def test_buffers_are_ignored_and_foreign_keys_are_not():
    neox, gptj = (family(config_from_hf(make(*v).config.to_dict())) for v in [("gpt_neox", "20b"), ("gptj", "gptj")])
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        assert neox.from_hf_key(f"gpt_neox.layers.0.attention.{name}") is None
    assert gptj.from_hf_key("transformer.h.1.attn.masked_bias") is None
    assert neox.from_hf_key("lm_head.weight") == neox.from_hf_key("embed_out.weight") == ("head", "embed_out.weight")
    for kind in (neox, gptj):
        with pytest.raises(KeyError):
            kind.from_hf_key("model.layers.0.self_attn.q_proj.weight")


def test_init_weights_depends_on_the_shard_and_not_on_the_cut():
    config = config_from_hf(make("gpt_neox", "pythia").config.to_dict())
    found = []
    for cuts in [(0, 3)], [(0, 1), (1, 3)]:
        values = {}
        for first, last in cuts:
            with torch.device("meta"):
                stage = Stage(config, first, last, embed=first == 0, head=last == 3)
            stage.to_empty(device="cpu")
            stage.init_weights(7)
            values |= {
                f"{shard}/{n}": p for shard, module in stage.named_shards() for n, p in module.named_parameters()
            }
        found.append(values)
    whole, parts = found
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert abs(whole["head/embed_out.weight"].std().item() - 0.02) < 2e-3
    assert not torch.equal(whole["layer_00000/mlp.dense_h_to_4h.weight"], whole["layer_00001/mlp.dense_h_to_4h.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_both_ends_of_a_new_tied_model_are_one_matrix_in_whichever_stages_they_are(tied):
    config = config_from_hf(GPTNeoXConfig(**TINY, tie_word_embeddings=tied).to_dict())
    first, second = Stage(config, last=1, head=False), Stage(config, 1, embed=False)
    for part in (first, second):
        part.init_weights(3)
    assert torch.equal(first.shards["embed"].embed_in.weight, second.projection.weight) == tied
