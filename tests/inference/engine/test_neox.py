"""GPT-NeoX's own forward pass against transformers'."""

import copy

import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from openchatkit.inference.engine import attention, neox
from openchatkit.inference.engine.kv_cache import new_cache
from openchatkit.libraries import hf_transformers

COMMON = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(384, (1, 300), generator=torch.Generator().manual_seed(0))


def make(**options) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(**COMMON, intermediate_size=128, initializer_range=0.3, **options)
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def own(model: GPTNeoXForCausalLM) -> GPTNeoXForCausalLM:
    made = copy.deepcopy(model)
    assert attention.use(made)
    assert neox.use(made)
    return made


def read(model, parts, cache, **options) -> list[torch.Tensor]:
    name = hf_transformers.cache_argument(model)
    return [model(input_ids=part, use_cache=True, **{name: cache}, **options).logits for part in parts]


@torch.inference_mode()
@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_is_that_of_transformers(dtype, parallel, rotary):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    model = make(use_parallel_residual=parallel, rope_parameters=rope)
    # Longer than the rotary table is at first; single tokens, several, and one part of a prompt behind another.
    parts = TOKENS.split([1, 5, 150, 1, 1, 142], dim=1)
    expected = torch.cat(read(model, parts, DynamicCache(config=model.config)), dim=1)
    made = own(model.to(dtype))
    got = torch.cat(read(made, parts, new_cache(model.config, dtype=torch.float32)), dim=1)
    assert got.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        theirs = torch.cat(read(model, parts, DynamicCache(config=model.config)), dim=1)
        assert (got.float() - expected).norm() < 1.1 * (theirs.float() - expected).norm()


@torch.inference_mode()
def test_the_last_logits_alone_and_a_text_that_is_cut_and_gone_on_with():
    model = make()
    made, cache = own(model), new_cache(model.config)
    expected = model(TOKENS[:, :12]).logits
    torch.testing.assert_close(read(made, [TOKENS[:, :10]], cache, logits_to_keep=3)[0], expected[:, 7:10])
    cache.truncate(4)
    torch.testing.assert_close(read(made, [TOKENS[:, 4:12]], cache, logits_to_keep=1)[0], expected[:, -1:])


@torch.inference_mode()
def test_anything_else_is_left_to_transformers():
    model = make()
    made, tokens = own(model), TOKENS[:, :12]
    torch.testing.assert_close(made(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(made(input_ids=tokens, labels=tokens).loss, model(input_ids=tokens, labels=tokens).loss)
    ours, theirs = (read(one, [tokens], DynamicCache(config=model.config))[0] for one in (made, model))
    torch.testing.assert_close(ours, theirs)
    rows = TOKENS.view(2, -1)
    ours, theirs = (read(one, [rows], new_cache(model.config))[0] for one in (made, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "logits_to_keep" in hf_transformers.inspect.signature(made.forward).parameters


def test_other_models_are_left_alone():
    llama = LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=128))
    dynamic = make(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    renamed = make()
    renamed.gpt_neox.layers[1].mlp.up = renamed.gpt_neox.layers[1].mlp.dense_h_to_4h
    del renamed.gpt_neox.layers[1].mlp.dense_h_to_4h
    for model in (llama, dynamic, renamed):
        before = model.forward
        assert not neox.use(model)
        assert model.forward == before
