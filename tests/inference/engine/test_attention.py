"""Attention on the CPU against transformers' own, through whole models and by itself."""

import pytest
import torch
from torch.nn import functional
from transformers import (
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from openchatkit.inference.engine import attention

COMMON = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(family: str):
    torch.manual_seed(0)
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON, intermediate_size=64, initializer_range=0.3)).eval()
    if family == "llama":
        config = LlamaConfig(**COMMON, num_key_value_heads=2, intermediate_size=64, initializer_range=0.3)
        return LlamaForCausalLM(config).eval()
    config = GPTJConfig(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=8)
    return GPTJForCausalLM(config).eval()


class Upcast(DynamicCache):
    """Keys and values kept in float32, whatever their dtype."""

    def update(self, key, value, *args, **options):
        return super().update(key.float(), value.float(), *args, **options)


@torch.inference_mode()
def logits(model, tokens, prefix, cache):
    if prefix:
        model(input_ids=tokens[:, :prefix], past_key_values=cache)
    return model(input_ids=tokens[:, prefix:], past_key_values=cache).logits.float()


@pytest.mark.parametrize(("prefix", "new"), [(0, 1), (0, 40), (1, 1), (1, 39), (30, 1), (30, 10), (7, 300)])
@pytest.mark.parametrize("family", ["neox", "llama", "gptj"])
def test_logits_equal_those_of_transformers(family, prefix, new):
    model = make(family)
    tokens = torch.randint(0, 384, (1, prefix + new), generator=torch.Generator().manual_seed(1))
    expected = logits(model, tokens, prefix, DynamicCache(config=model.config))
    assert attention.use(model)
    for cache in (DynamicCache, Upcast):
        got = logits(model, tokens, prefix, cache(config=model.config))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["neox", "llama", "gptj"])
def test_bfloat16_with_a_cache_in_float32_is_as_near_to_float32_as_transformers_is(family):
    model = make(family)
    tokens = torch.randint(0, 384, (1, 60), generator=torch.Generator().manual_seed(1))
    exact = logits(model, tokens, 50, DynamicCache(config=model.config))
    model.to(torch.bfloat16)
    theirs = logits(model, tokens, 50, DynamicCache(config=model.config))
    attention.use(model)
    ours = logits(model, tokens, 50, Upcast(config=model.config))
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize("family", ["neox", "llama", "gptj"])
def test_padding_and_several_texts_are_masked(family):
    model = make(family)
    tokens = torch.randint(2, 384, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.inference_mode():
        expected = model(tokens, attention_mask=mask).logits
        attention.use(model)
        got = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["neox", "llama", "gptj"])
def test_a_cache_of_fixed_size_is_read_as_far_as_it_is_filled(family):
    model = make(family)
    tokens = torch.randint(0, 384, (1, 20), generator=torch.Generator().manual_seed(1))
    expected = logits(model, tokens, 12, DynamicCache(config=model.config))
    attention.use(model)
    got = logits(model, tokens, 12, StaticCache(config=model.config, max_cache_len=64))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_generating_is_the_same(random_models):
    from transformers import AutoModelForCausalLM

    for folder in random_models.values():
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompt = torch.tensor([[5, 6, 7, 8]])
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(prompt, **options)
        attention.use(model)
        assert torch.equal(model.generate(prompt, **options), expected)


def test_other_families_keep_their_own():
    model = MistralForCausalLM(MistralConfig(**COMMON, num_key_value_heads=2, intermediate_size=64, sliding_window=4))
    before = model.config._attn_implementation
    assert not attention.use(model)
    assert model.config._attn_implementation == before


def test_queries_in_several_blocks_are_causal_too(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 3)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 11, 16), torch.randn(1, 2, 11, 16)
    got, _ = attention.attention(None, query, key, value, None, scaling=0.3)
    allowed = torch.ones(8, 11, dtype=torch.bool).tril(3)
    repeated = (key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1))
    expected = functional.scaled_dot_product_attention(query, *repeated, attn_mask=allowed, scale=0.3)
    torch.testing.assert_close(got, expected.transpose(1, 2))
