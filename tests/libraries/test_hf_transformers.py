"""Changes in transformers: each former name of an argument, and models without a hook."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
)

from openchatkit.libraries import hf_transformers

TINY = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def build(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class Renamed(nn.Module):
    """A model whose forward takes the cache under one of the names that it has had."""

    def __init__(self, name: str, config: object, *, stateful: bool = False) -> None:
        super().__init__()
        self.config, self._is_stateful = config, stateful
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.forward = lambda *arguments, **options: None
        self.forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind)])


@pytest.mark.parametrize(("name", "found"), [("cache", "cache"), ("past_key_values",) * 2, ("past", None)])
def test_the_cache_is_passed_under_the_name_that_the_model_has_for_it(name, found):
    assert hf_transformers.cache_argument(Renamed(name, GPTNeoXConfig(**TINY))) == found


@pytest.mark.parametrize("config", [GPTNeoXConfig(**TINY), LlamaConfig(**TINY), Gemma2Config(**TINY)])
def test_transformers_as_it_is_installed_has_one_of_the_names(config):
    model = build(config)
    assert hf_transformers.cache_argument(model) in inspect.signature(model.forward).parameters


def test_recurrent_models_keep_no_keys_whatever_their_argument_is_called():
    assert (
        hf_transformers.cache_argument(build(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))) is None
    )
    assert hf_transformers.cache_argument(Renamed("cache", MambaConfig(num_hidden_layers=1), stateful=True)) is None


def test_layers_that_keep_everything_are_counted():
    assert hf_transformers.plain_cache_layers(GPTNeoXConfig(**TINY)) == 2
    assert hf_transformers.plain_cache_layers(Gemma2Config(**TINY)) is None
    assert hf_transformers.plain_cache_layers(MambaConfig(num_hidden_layers=1)) is None


def test_gptjs_attention_with_its_former_method_and_without():
    old = SimpleNamespace(scale_attn=torch.tensor(4.0), _attn=lambda *arguments: None)
    for module, count in ((old, 1), (SimpleNamespace(scaling=0.25), 0)):
        model = SimpleNamespace(transformer=SimpleNamespace(h=[SimpleNamespace(attn=module)]))
        assert len(hf_transformers.gptj_attentions(model)) == count


def test_an_unsupported_attention_function_leaves_the_model_unchanged():
    model = build(GPTNeoXConfig(**TINY))
    before = model.config._attn_implementation
    assert not hf_transformers.attend_by(model, "of_nobody")
    assert model.config._attn_implementation == before


def test_undeclared_features_count_as_missing():
    model = SimpleNamespace()
    assert not hf_transformers.compiles_as_a_whole(model)
    assert hf_transformers.devices(model) == frozenset()
    model = SimpleNamespace(_can_compile_fullgraph=True, hf_quantizer=SimpleNamespace(is_compileable=False))
    assert not hf_transformers.compiles_as_a_whole(model)
    model.hf_quantizer = None
    assert hf_transformers.compiles_as_a_whole(model)


def test_the_class_of_a_family_with_the_internal_table_and_without(monkeypatch):
    from transformers.models.auto import modeling_auto

    expected = {"gpt_neox": "GPTNeoXForCausalLM", "gptj": "GPTJForCausalLM"}
    assert {name: hf_transformers.causal_lm_class(name) for name in expected} == expected
    monkeypatch.delattr(modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    assert {name: hf_transformers.causal_lm_class(name) for name in expected} == expected
    assert GPTJConfig().model_type in expected
