"""The prefix cache of an engine: never a different token, and no token read twice without need."""

import contextlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from openchatkit.inference.engine import prefix_cache
from openchatkit.inference.engine.engine import Engine, OutOfMemory, Statistics
from openchatkit.inference.engine.sampling import Sampling

GREEDY = Sampling(max_tokens=12, sample=False)
FAMILIES = ("neox", "gptj")
TINY = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def models(random_models):
    torch.manual_seed(2)
    made = {name: AutoModelForCausalLM.from_pretrained(random_models[name]).eval() for name in FAMILIES}
    made["llama"] = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    made["sliding"] = MistralForCausalLM(MistralConfig(**TINY, sliding_window=8)).eval()
    return made


def engine(model, **options) -> Engine:
    return Engine(model, eos_ids=(), device=torch.device("cpu"), **options)


def say(running: Engine, prompt, sampling=GREEDY) -> tuple[list[int], int]:
    """The reply, and how many tokens of the prompt were not read for it."""
    statistics = Statistics()
    return list(running.generate(prompt, sampling, statistics=statistics)), statistics.cached_tokens


def fresh(model, prompt) -> list[int]:
    return say(engine(model), prompt)[0]


def oracle(model, prompt) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=GREEDY.max_tokens,
        min_new_tokens=GREEDY.max_tokens,
        pad_token_id=1,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_undone_regenerated_and_edited_turns_are_read_from_where_they_differ(models, name):
    # generate() may not end a reply early here, so it may not say token 0, which ends one; nor does this model want to.
    model = models[name]
    running = engine(model)

    def turn(prompt, cached):
        reply, kept = say(running, prompt)
        assert reply == oracle(model, prompt)
        assert kept == cached
        return reply

    first = list(range(100, 130))
    said = turn(first, 0)
    # The last token of a reply is never read for its own sake.
    second = [*first, *said, 7, 8, 9]
    again = turn(second, len(first) + len(said) - 1)
    turn([*second, *again, 5], len(second) + len(again) - 1)
    turn(second, len(second) - 1)  # the last turn undone and answered again
    turn(second, len(second) - 1)
    edited = [*first[:10], 300, *first[11:]]
    turn(edited, 10)
    turn([200, 201], 0)
    turn([200], 0)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_sequence_of_prompts_changes_a_token(models, name, data):
    model = models[name]
    running = engine(model, slots=data.draw(st.integers(1, 3)))
    texts = [[5]]
    for _ in range(data.draw(st.integers(2, 6))):
        base = data.draw(st.sampled_from(texts))
        kept = data.draw(st.integers(0, len(base)))
        prompt = [*base[:kept], *data.draw(st.lists(st.integers(2, 383), min_size=1, max_size=9))]
        taken = data.draw(st.integers(1, GREEDY.max_tokens))
        lookup = data.draw(st.booleans())
        expected = fresh(model, prompt)[:taken]
        stream = running.generate(prompt, GREEDY, lookup=lookup)
        reply = [next(stream) for _ in range(taken)]
        stream.close()
        assert reply == expected
        texts += [prompt, [*prompt, *reply]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_prompt_is_read_in_parts_and_says_the_same(models, name, monkeypatch):
    model, prompt = models[name], [2 + number % 381 for number in range(200)]
    expected = fresh(model, prompt)
    running = engine(model, chunk=64)
    sizes = []
    forward = model.forward

    def counted(**inputs):
        sizes.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counted)
    assert say(running, prompt)[0] == expected
    assert sizes[:5] == [64, 64, 64, 8, 1]


@pytest.mark.parametrize("name", [*FAMILIES, "sliding"])
def test_a_cancelled_prefill_stops_and_is_resumed(models, name, monkeypatch):
    model, prompt = models[name], [2 + number % 381 for number in range(200)]
    running, statistics, asked = engine(model, chunk=64), Statistics(), []
    stream = running.generate(
        prompt, GREEDY, statistics=statistics, cancelled=lambda: asked.append(1) or len(asked) > 2
    )
    assert list(stream) == []
    assert (len(asked), statistics.new_tokens) == (3, 0)
    assert say(running, prompt) == (fresh(model, prompt), 128)
    assert list(running.generate(prompt, GREEDY, cancelled=lambda: True)) == []


class Interrupting:
    """Raises `error` in the middle of a forward pass: in the last layer, at the given call."""

    def __init__(self, model, monkeypatch, call: int, error: BaseException) -> None:
        layers = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.transformer.h
        self.calls = 0
        forward = layers[-1].forward

        def fail(*args, **kwargs):
            self.calls += 1
            if self.calls == call:
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(layers[-1], "forward", fail)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_ctrl_c_in_a_pass_keeps_what_was_read_before_it(models, name, call, monkeypatch):
    model, prompt = models[name], [40, 50, 60, 70]
    expected = fresh(model, prompt)
    running = engine(model)
    with monkeypatch.context() as patch:
        Interrupting(model, patch, call, KeyboardInterrupt())
        reply = []
        with pytest.raises(KeyboardInterrupt):
            reply.extend(running.generate(prompt, GREEDY))  # which keeps what came before the error
    assert reply == expected[: call - 1]
    longer = [*prompt, *reply, 9]
    held = len(prompt) + call - 2 if call > 1 else 0
    assert say(running, longer) == (fresh(model, longer), held)


def test_any_other_error_in_a_pass_drops_what_was_kept(models, monkeypatch):
    model, prompt = models["neox"], [40, 50, 60, 70]
    running = engine(model)
    with monkeypatch.context() as patch:
        Interrupting(model, patch, 3, ValueError("a defect"))
        with pytest.raises(ValueError, match="a defect"):
            say(running, prompt)
    assert say(running, prompt) == (fresh(model, prompt), 0)


def test_running_out_of_memory_frees_every_slot(models, monkeypatch):
    model, prompts = models["neox"], ([3] * 9, [4] * 9)
    running = engine(model, slots=2)
    for prompt in prompts:
        say(running, prompt)
    assert [len(slot.tokens) for slot in running.prefix_cache.slots] == [20, 20]
    with monkeypatch.context() as patch:
        Interrupting(model, patch, 2, torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(OutOfMemory) as raised:
            say(running, [*prompts[0], 8])
    assert all(slot._cache is None and not slot.tokens for slot in running.prefix_cache.slots)
    assert raised.value.exit_status == 2
    assert say(running, prompts[0]) == (fresh(model, prompts[0]), 0)


def test_texts_of_several_users_are_kept_side_by_side(models):
    running = engine(models["neox"], slots=2)
    preamble = [9] * 6
    texts = {user: [*preamble, *[user] * 20] for user in (11, 22, 33)}
    assert say(running, texts[11])[1] == 0
    assert say(running, texts[22])[1] == 0, "another user's text for the sake of six tokens"
    for user in (11, 22, 11, 22):
        reply, kept = say(running, texts[user])
        assert kept == 25
        assert reply == fresh(models["neox"], texts[user])
    # A third evicts the one that was used longest ago.
    assert say(running, texts[33])[1] == len(preamble)
    assert say(running, texts[22])[1] == 25


def test_forgetting_reads_everything_again(models):
    running = engine(models["neox"])
    say(running, [1, 2, 3])
    running.forget()
    assert say(running, [1, 2, 3]) == (fresh(models["neox"], [1, 2, 3]), 0)


def test_a_model_with_sliding_windows_starts_afresh_unless_a_text_just_goes_on(models):
    model = models["sliding"]
    running = engine(model)
    prompt = list(range(20, 50))
    reply, _ = say(running, prompt)
    assert reply == oracle(model, prompt)
    longer = [*prompt, *reply, 4]
    again, kept = say(running, longer)
    assert (again, kept) == (oracle(model, longer), len(prompt) + len(reply) - 1)
    assert say(running, prompt) == (reply, 0)
    assert list(running.generate(prompt * 2, GREEDY, lookup=True)) == oracle(model, prompt * 2)


def test_a_model_with_recurrent_states_goes_on_one_token_at_a_time_or_starts_afresh(monkeypatch):
    torch.manual_seed(4)
    states = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 1}
    model = JambaForCausalLM(JambaConfig(**TINY, **states, num_experts_per_tok=1, pad_token_id=1)).eval()
    prompt = [*range(40, 80)]
    running = engine(model, chunk=16)
    reply, _ = say(running, prompt)
    assert reply == oracle(model, prompt)
    # The last token that was said has not been read yet.
    for new, held in ((20, len(prompt) + 11), (prefix_cache.MAX_SINGLE_STEPS + 1, 0)):
        prompt = [*prompt, *reply, *range(100, 100 + new)]
        reply, cached = say(running, prompt)
        assert (reply, cached) == (oracle(model, prompt), held)
    assert say(running, prompt[:-1]) == (oracle(model, prompt[:-1]), 0)


def test_an_interrupt_loses_no_slot(models):
    """Ctrl-C may come between any two lines of `take`."""
    running = engine(models["neox"], slots=2)
    slots = set(map(id, running.prefix_cache.slots))
    take = prefix_cache.PrefixCache.take.__code__
    lines = sorted({line for _, _, line in take.co_lines() if line and line > take.co_firstlineno})
    for stop in lines:

        def interrupt(frame, event, _, stop=stop):
            if frame.f_code is not take:
                return None
            if event == "line" and frame.f_lineno == stop:
                raise KeyboardInterrupt
            return interrupt

        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                running.prefix_cache.take([1, 2, 3])
        finally:
            sys.settrace(before)
        assert set(map(id, running.prefix_cache.slots)) == slots, stop
    assert say(running, [1, 2, 3])[0] == fresh(models["neox"], [1, 2, 3])


def test_a_second_reply_ends_the_first(models):
    running = engine(models["neox"])
    first = running.generate([1, 2, 3], GREEDY)
    next(first)
    assert say(running, [4, 5])[0] == fresh(models["neox"], [4, 5])
    with pytest.raises(AssertionError, match="another reply was begun"):
        next(first)


def test_prompts_must_fit_the_context_and_replies_end_with_it(models):
    running = engine(models["neox"])
    limit = running.context_length
    assert len(list(running.generate([3] * limit, GREEDY))) == 1
    assert len(list(running.generate([3] * (limit - 4), GREEDY))) == 5
    for prompt in ([3] * (limit + 1), []):
        with pytest.raises(AssertionError, match="prompt"):
            next(running.generate(prompt, GREEDY))


@pytest.mark.parametrize("name", [*FAMILIES, "sliding"])
def test_log_likelihoods_are_those_of_a_plain_forward_pass(models, name):
    model = models[name]
    running = engine(model)
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    prompt, labels = list(range(30, 60)), [[7], [7, 8], [100, 5, 6, 7], [9, 9, 9]]
    say(running, [*prompt[:20], 5])
    for _ in range(2):
        found = running.log_likelihoods(prompt, labels)
        for label, value in zip(labels, found, strict=True):
            ids = torch.tensor([[*prompt, *label]])
            with torch.no_grad():
                rows = double(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            assert value == pytest.approx(sum(rows[row, token].item() for row, token in enumerate(label)), abs=1e-4)
    # And the prompt is held, so that it can be gone on from.
    if name != "sliding":
        assert say(running, [*prompt, 5]) == (fresh(model, [*prompt, 5]), len(prompt))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_penalty_on_repetition_is_that_of_generate(models, name):
    model, prompt = models[name], [40, 50, 60, 40]
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": 40, "repetition_penalty": 1.3, "pad_token_id": 1}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
    expected = output[0, len(prompt) :].tolist()
    sampling = Sampling(max_tokens=40, sample=False, repetition_penalty=1.3)
    assert say(engine(model), prompt, sampling)[0] == expected
    assert say(engine(model), prompt, Sampling(max_tokens=40, sample=False))[0] != expected
