"""The settings of a reply, and the filters against transformers' own logits processors."""

import math
from dataclasses import fields

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from openchatkit.errors import UserError
from openchatkit.inference.engine import sampling as settings
from openchatkit.inference.engine.sampling import Sampling, change, check, choose, mark_seen

VOCABULARY = 200
SEEN = [3, 5, 5, 199, 40]


def oracle(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities that generate() would draw from."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(torch.tensor([SEEN]), logits[None].double())[0].softmax(dim=-1)


def drawn_from(logits: torch.Tensor, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The probabilities that `choose` draws from: each place in the weights is asked for its token."""
    probabilities = torch.zeros(VOCABULARY, dtype=torch.float64)
    place, given = 0, []

    def pick(weights, count, *, generator):
        given[:] = [weights / weights.sum()]
        return torch.tensor([place])

    monkeypatch.setattr(torch, "multinomial", pick)
    while place < (len(given[0]) if given else 1):
        token = choose(logits, sampling, seen=mark_seen(SEEN, logits))
        probabilities[token] = given[0][place]
        place += 1
    return probabilities


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_k=0),
        Sampling(temperature=1.3, top_k=17),
        Sampling(temperature=1.0, top_k=0, top_p=0.8),
        Sampling(temperature=0.5, top_k=30, top_p=0.31),
        Sampling(temperature=1.0, top_k=0, min_p=0.1),
        Sampling(temperature=2.0, top_k=50, top_p=0.9, min_p=0.05),
        Sampling(temperature=0.9, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.7),
        Sampling(temperature=0.9, top_k=0, repetition_penalty=0.6),
        Sampling(temperature=1.0, top_k=5, top_p=1e-9),
        Sampling(temperature=1.0, top_k=0, min_p=1.0),
    ],
    ids=repr,
)
def test_the_filters_keep_what_those_of_transformers_keep(sampling, monkeypatch):
    for seed in range(3):
        logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
        expected = oracle(logits, sampling)
        found = drawn_from(logits, sampling, monkeypatch)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_the_penalty_counts_for_the_most_probable_token_too():
    logits = torch.tensor([3.0, 2.9, -1.0])
    penalised = Sampling(sample=False, repetition_penalty=1.1)
    assert choose(logits, penalised, seen=mark_seen([2], logits)) == 0
    assert choose(logits, penalised, seen=mark_seen([0], logits)) == 1
    negative = torch.tensor([-3.0, -2.9])
    assert choose(negative, penalised, seen=mark_seen([1], negative)) == 0


def test_tokens_that_the_model_cannot_say_are_no_trouble():
    assert mark_seen([1, 1, 7], torch.zeros(3)).tolist() == [False, True, False]
    assert not mark_seen([], torch.zeros(3)).any()


def test_every_setting_has_a_rule():
    assert list(settings._RULES) == [field.name for field in fields(Sampling)]
    check(Sampling())
    check(Sampling(max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=1, repetition_penalty=2))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", True, "a whole number"),
        ("sample", 1, "yes or no"),
        ("temperature", -0.1, "0 takes the most probable"),
        ("temperature", math.nan, "a number"),
        ("temperature", math.inf, "a number"),
        ("temperature", "hot", "a number"),
        ("temperature", None, "a number"),
        ("temperature", False, "a number"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", 1.01, "from 0 to 1"),
        ("min_p", -1e-9, "from 0 to 1"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("repetition_penalty", math.nan, "from 0.01 to 100"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name, value, expected):
    with pytest.raises(UserError) as refused:
        check(Sampling(**{name: value}))
    assert str(refused.value).startswith(f"{name} {value!r}: expected ")
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_tokens", "7", 7),
        ("max-tokens", "7", 7),
        ("sample", "no", False),
        ("sample", "ON", True),
        ("temperature", "0", 0.0),
        ("temperature", "1e-3", 0.001),
        ("top_k", "0", 0),
        ("repetition_penalty", "1.2", 1.2),
    ],
)
def test_a_setting_is_changed_by_its_name(name, text, value):
    before = Sampling(max_tokens=9, top_p=0.5)
    after = change(before, name, text)
    field = name.replace("-", "_")
    assert getattr(after, field) == value
    assert after == Sampling(**{"max_tokens": 9, "top_p": 0.5, field: value})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("heat", "1", "no setting 'heat': expected one of max_tokens, sample, temperature,"),
        ("max_tokens", "many", "max_tokens 'many': expected a whole number"),
        ("max_tokens", "9" * 5000, r"max_tokens '9+\.\.\.: expected"),
        ("top_p", "nan", "top_p nan: expected"),
        ("top_p", "", "top_p '': expected"),
        ("sample", "perhaps", "sample 'perhaps': expected yes or no"),
    ],
)
def test_an_invalid_setting_is_one_line(name, text, said):
    with pytest.raises(UserError, match=said) as refused:
        change(Sampling(), name, text)
    assert len(str(refused.value)) < 200
