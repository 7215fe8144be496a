"""Speculation by prompt lookup, and replies that are the same with and without it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from openchatkit.inference.engine.engine import Engine, Statistics
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.engine.speculation import CREDIT, MAX_DRAFT, MAX_RUN, PromptLookup, Speculation


def test_a_draft_continues_as_the_text_did_after_an_earlier_equal_run():
    assert PromptLookup([1, 2, 3, 4, 5, 9, 1, 2]).guess(3).draft == [3, 4, 5]
    assert PromptLookup([1, 2, 3, 4, 5, 9, 1, 2]).guess(100).draft == [3, 4, 5, 9, 1]
    assert not PromptLookup([1, 2, 3, 1, 2]).guess(0).draft
    assert not PromptLookup([1, 2, 3, 4]).guess(5).draft
    assert not PromptLookup([1]).guess(5).draft


def test_the_longest_run_decides_then_the_nearest():
    text = [7, 1, 2, 50, 8, 1, 2, 60, 9, 1, 2, 70]
    assert PromptLookup([*text, 1, 2]).guess(1).draft == [70]
    assert PromptLookup([*text, 8, 1, 2]).guess(1).draft == [60]
    assert PromptLookup([*text, 7, 1, 2]).guess(1).draft == [50]
    assert MAX_RUN >= 3


def test_a_draft_of_a_repeating_text_continues_beyond_its_end():
    assert PromptLookup([4, 4, 4]).guess(5).draft == [4, 4, 4, 4, 4]
    assert PromptLookup([1, 2, 3, 1, 2, 3]).guess(5).draft == [1, 2, 3, 1, 2]


def test_tokens_of_the_reply_are_found_too():
    lookup = PromptLookup([1, 2, 3])
    for token in (8, 9, 5, 8, 9):
        lookup.append(token)
    assert lookup.guess(1).draft == [5]


def test_drafts_grow_with_accepted_guesses_and_end_without_any():
    lookup = PromptLookup([1, 2] * 20)
    lookup.learn(Speculation([0] * (MAX_DRAFT // 2), MAX_DRAFT // 2))
    assert len(lookup.guess(100).draft) == MAX_DRAFT
    lookup.learn(Speculation([0] * MAX_DRAFT, 3))
    assert len(lookup.guess(100).draft) == 3
    for _ in range(CREDIT):
        lookup.learn(Speculation([0] * 3, 0))
    assert not lookup.guess(100).draft


def test_drafts_of_one_length_are_that_long_or_none():
    lookup = PromptLookup([1, 2, 3, 1, 2], length=7)
    assert len(lookup.guess(7).draft) == 7
    assert not lookup.guess(6).draft
    lookup.learn(Speculation([0] * 7, 1))
    assert len(lookup.guess(9).draft) == 7


@pytest.mark.parametrize("family", ["neox", "gptj"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=60, sample=False),
        Sampling(max_tokens=60, sample=False, repetition_penalty=1.05),
        Sampling(max_tokens=60, temperature=0.3),
        Sampling(max_tokens=60, temperature=0.5, top_k=0, top_p=0.9, repetition_penalty=0.9),
    ],
    ids=repr,
)
def test_replies_are_the_same_with_and_without(random_models, family, sampling):
    model = AutoModelForCausalLM.from_pretrained(random_models[family]).eval()
    drafted = accepted = 0
    for start in range(4):
        free = Engine(model, eos_ids=(), device=torch.device("cpu"))
        prompt = [10 + start, 20, 30]
        # A prompt that holds the reply, as a passage does that is quoted.
        said = list(free.generate(prompt, Sampling(max_tokens=60, sample=False)))
        prompt = [*prompt, *said, *prompt]
        replies = []
        for lookup in (False, True):
            engine = Engine(model, eos_ids=(), device=torch.device("cpu"))
            statistics = Statistics()
            generator = torch.Generator().manual_seed(start)
            replies.append(list(engine.generate(prompt, sampling, generator, statistics=statistics, lookup=lookup)))
            # And what the cache holds after guesses, right and wrong, is right for the next turn.
            longer = [*prompt, *replies[-1], 5]
            replies[-1] += engine.generate(longer, sampling, generator, statistics=Statistics(), lookup=lookup)
        assert replies[0] == replies[1]
        assert statistics.new_tokens == 60
        drafted += statistics.drafted_tokens
        accepted += statistics.accepted_tokens
    assert 0 < accepted < drafted


def test_a_draft_never_goes_beyond_what_was_asked_for(random_models):
    model = AutoModelForCausalLM.from_pretrained(random_models["neox"]).eval()
    engine = Engine(model, eos_ids=(), device=torch.device("cpu"))
    limit = engine.context_length
    for most in (1, 2, 3, 7):
        assert len(list(engine.generate([3] * 30, Sampling(max_tokens=most, sample=False), lookup=True))) == most
    for length in (limit - 3, limit):
        tokens = list(engine.generate([3] * length, Sampling(max_tokens=50, sample=False), lookup=True))
        assert len(tokens) == limit - length + 1
