"""config.json in its old and new spelling, and what is refused."""

import pytest

from openchatkit.errors import UserError
from openchatkit.models.registry import config_from_hf

OLD = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
}


def new_spelling(**rope):
    raw = {key: value for key, value in OLD.items() if not key.startswith("rotary")}
    return {**raw, "rope_parameters": {"rope_type": "default", **rope}}


def test_both_spellings_mean_the_same():
    old = config_from_hf(OLD)
    assert old == config_from_hf(new_spelling(partial_rotary_factor=0.25, rope_theta=10000.0))
    assert (old.rotary_dim, old.rotary_base, old.head_dim) == (16, 10000.0, 64)


def test_both_spellings_at_once_must_agree():
    both = {**OLD, **new_spelling(partial_rotary_factor=0.25, rope_theta=10000)}
    assert config_from_hf(both) == config_from_hf(OLD)
    with pytest.raises(
        UserError, match=r"contradicts itself: rotary_pct=0.25, rope_parameters.partial_rotary_factor=1"
    ):
        config_from_hf({**OLD, **new_spelling(partial_rotary_factor=1.0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; the kit knows gpt_neox, gptj"),
        ({"hidden_act": "selu"}, "activation 'selu' is not supported"),
        ({"hidden_size": 500}, "hidden size 500 is not a multiple of 8"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"rotary_pct": 0.0}, "0 rotary dimensions"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear' is not supported"),
    ],
)
def test_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf({**OLD, **change})
