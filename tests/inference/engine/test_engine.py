"""The decode loop against transformers' generate(), its oracle, and how a token is chosen."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from openchatkit.errors import UserError
from openchatkit.inference.engine.engine import Engine, OutOfMemory
from openchatkit.inference.engine.sampling import Sampling, choose
from openchatkit.loading import model_kinds, stages

GREEDY = Sampling(max_tokens=40, sample=False)
PROMPT = [40, 50, 60, 70]


@pytest.fixture(params=["neox", "gptj"])
def model(request, random_models):
    return AutoModelForCausalLM.from_pretrained(random_models[request.param]).eval()


def engine(model, *, eos_ids=()) -> Engine:
    return Engine(model, eos_ids=eos_ids, device=torch.device("cpu"))


def oracle(model, prompt, *, eos_ids=None, max_tokens=40) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=eos_ids,
        pad_token_id=1,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [[5], PROMPT, list(range(100, 300))])
def test_greedy_is_what_generate_makes_token_for_token(model, prompt, dtype):
    model = model.to(dtype)
    expected = oracle(model, prompt)
    assert len(set(expected)) > 5, "a model that repeats itself proves little"
    assert list(engine(model).generate(prompt, GREEDY)) == expected


@pytest.mark.parametrize("name", ["neox", "gptj"])
def test_a_network_of_the_kit_is_decoded_as_transformers_decodes_it(random_models, name):
    model = AutoModelForCausalLM.from_pretrained(random_models[name]).eval()
    device = torch.device("cpu")
    stage = stages.load_stage(stages.open_shards(model_kinds.find(random_models[name])), device)
    for prompt in (PROMPT, list(range(100, 300))):
        expected = oracle(model, prompt)
        for options in ({}, {"chunk": 64}, {"recompute": True}):
            running = Engine(stage, eos_ids=[], device=device, **options)
            assert list(running.generate(prompt, GREEDY)) == expected
            # What a draft or an earlier reply left in the cache is not seen.
            assert list(running.generate(prompt[:2], GREEDY)) == oracle(model, prompt[:2])
    assert list(Engine(model, eos_ids=[], device=device, recompute=True).generate(PROMPT, GREEDY)) == oracle(
        model, PROMPT
    )
    with pytest.raises(AssertionError, match="a prompt of 513 tokens in a context of 512"):
        next(running.generate([5] * 513, GREEDY))


def test_end_of_text_ends_the_reply_and_is_no_part_of_it(model):
    free = oracle(model, PROMPT)
    end = free[7]
    expected = free[: free.index(end)]
    assert oracle(model, PROMPT, eos_ids=[end])[:-1] == expected
    assert list(engine(model, eos_ids=[end, 383]).generate(PROMPT, GREEDY)) == expected


def test_max_tokens_bounds_tokens_and_forward_passes(model, monkeypatch):
    passes = []
    forward = model.forward

    def counted(**inputs):
        passes.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    running = engine(model)
    monkeypatch.setattr(model, "forward", counted)
    assert len(list(running.generate(PROMPT, Sampling(max_tokens=3, sample=False)))) == 3
    assert passes == [4, 1, 1]


def test_a_seed_repeats_the_draws_and_another_seed_does_not(model):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(engine(model).generate(PROMPT, Sampling(max_tokens=30), generator))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_draws_follow_the_probabilities_of_the_largest_few():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    sampling = Sampling(temperature=0.5, top_k=3)
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    drawn = torch.bincount(torch.tensor([choose(logits, sampling, generator) for _ in range(count)]), minlength=5)
    weights = [math.exp(x / 0.5) for x in (2.0, 1.5, 1.0)]
    for token, weight in zip((1, 4, 2), weights, strict=True):
        p = weight / sum(weights)
        assert abs(drawn[token] / count - p) < 4 * math.sqrt(p * (1 - p) / count)
    assert drawn[0] == drawn[3] == 0


@pytest.mark.parametrize(
    "sampling",
    [Sampling(sample=False), Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=1e-300, top_k=5)],
)
def test_greedy_settings_take_the_most_probable_token(sampling):
    logits = torch.tensor([0.0, 2.0, 1.0, 1.9999])
    assert {choose(logits, sampling) for _ in range(20)} == {1}


def test_top_k_keeps_what_equals_the_last_of_them():
    logits, generator = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=1.0, top_k=2), generator) for _ in range(200)}
    assert drawn == {1, 2, 3}


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it():
    assert choose(torch.zeros(3), Sampling(top_k=1000)) in (0, 1, 2)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(sample=False)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error(sampling, value):
    with pytest.raises(UserError, match=r"output is (nan|inf), not a number: .*try --dtype"):
        choose(torch.tensor([0.0, value, 1.0]), sampling)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_not_taken_for_a_defect(random_models, monkeypatch, error):
    model = AutoModelForCausalLM.from_pretrained(random_models["neox"])
    running = engine(model)

    def fail(**inputs):
        raise error

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(OutOfMemory, match=r"out of memory: this turn was undone; .* smaller --max-tokens") as refused:
        list(running.generate(PROMPT, GREEDY))
    assert "/set max_tokens" in refused.value.typed
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(running.generate(PROMPT, GREEDY))
