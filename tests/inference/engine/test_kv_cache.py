"""Buffers that grow in place, against transformers' DynamicCache, and which models they are for."""

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from openchatkit.inference.engine.kv_cache import MIN_CAPACITY, GrowingCache, GrowingLayer, new_cache

HEADS, SIZE = 2, 4


def states(tokens: int, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(1, HEADS, tokens, SIZE).to(dtype)
    return keys, keys + 1


def test_it_holds_what_a_dynamic_cache_holds():
    torch.manual_seed(0)
    grown, oracle = GrowingLayer(), DynamicLayer()
    for step in (5, 1, 1, -3, 100, 1, -60, -1, 7, 300):
        if step < 0:
            grown.truncate(grown.get_seq_length() + step)
            oracle.crop(step)
        else:
            assert grown.get_mask_sizes(step) == oracle.get_mask_sizes(step)
            new = states(step)
            for mine, theirs in zip(grown.update(*new), oracle.update(*new), strict=True):
                assert torch.equal(mine, theirs)
        assert grown.get_seq_length() == oracle.get_seq_length()


def test_a_token_costs_no_copy_of_the_others():
    layer = GrowingLayer()
    first, _ = layer.update(*states(3))
    places = {first.data_ptr()}
    moves = 0
    for _ in range(1000):
        keys, _ = layer.update(*states(1))
        moves += keys.data_ptr() not in places
        places.add(keys.data_ptr())
    assert moves < 10
    assert torch.equal(keys[:, :, :3], first)


def test_it_grows_to_its_limit_and_no_further():
    layer = GrowingLayer(limit=100)
    for _ in range(100):
        layer.update(*states(1))
        capacity = layer._buffers[0].shape[2]
        assert MIN_CAPACITY <= capacity <= 100
    assert capacity == 100


def test_its_precision_may_differ_from_the_models():
    layer = GrowingLayer(torch.float32)
    keys, values = states(3, dtype=torch.bfloat16)
    kept_keys, kept_values = layer.update(keys, values)
    assert kept_keys.dtype == kept_values.dtype == torch.float32
    assert torch.equal(kept_keys, keys.float())
    assert torch.equal(kept_values, values.float())


def test_reset_frees_and_truncate_refuses_what_is_not_there():
    layer = GrowingLayer()
    layer.update(*states(3))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer._buffers is None
    with pytest.raises(AssertionError, match="1 tokens of a buffer for 0"):
        layer.truncate(1)


@pytest.mark.parametrize("config", [GPTNeoXConfig(), GPTJConfig(), LlamaConfig(), MistralConfig(sliding_window=None)])
def test_models_that_attend_to_everything_have_it(config):
    cache = new_cache(config)
    assert type(cache) is GrowingCache
    assert len(cache.layers) == config.num_hidden_layers


@pytest.mark.parametrize("config", [MistralConfig(sliding_window=16), Gemma2Config()])
def test_other_models_have_the_cache_that_transformers_makes_for_them(config):
    assert type(new_cache(config)) is DynamicCache
