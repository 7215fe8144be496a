"""Greedy decoding (models/generation.py) against transformers' `generate()` and a plain loop without a cache."""

import pytest
import torch
from test_parity import make, stages_of

from openchatkit.models.generation import greedy

PROMPTS = [[5, 17, 3, 60, 22, 9, 41], [8, 8], [33, 2, 55, 70]]


def plain_loop(stage, prompt, count):
    """The likeliest tokens, each from a forward over the whole row."""
    row = list(prompt)
    for _ in range(count):
        row.append(stage.logits(stage(torch.tensor([row])))[0, -1].argmax().item())
    return row[len(prompt) :]


@pytest.fixture(params=[("gpt_neox", "pythia"), ("gpt_neox", "tied"), ("gptj", "gptj")], ids=str)
def pair(request):
    """A model of transformers and our stage of it, in float64 so that no near tie is decided by rounding."""
    model = make(*request.param).double().eval()
    (stage,) = stages_of(model)
    return model, stage.double()


@torch.inference_mode()
def test_rows_of_several_lengths_go_on_as_each_by_itself(pair):
    model, stage = pair
    found = greedy(stage, PROMPTS, max_new_tokens=15)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert new == plain_loop(stage, prompt, 15)
        options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert new == model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_end_of_text_and_a_stop_end_one_row_alone(pair):
    _, stage = pair
    free = greedy(stage, PROMPTS, max_new_tokens=12)
    end = free[0][4]
    cut = [new[: new.index(end)] if end in new else new for new in free]
    assert greedy(stage, PROMPTS, max_new_tokens=12, eos_ids={end}) == cut
    stopped = [new[: new.index(end) + 1] if end in new else new for new in free]
    assert greedy(stage, PROMPTS, max_new_tokens=12, is_done=lambda new: new[-1:] == [end]) == stopped


def test_no_step_is_taken_once_all_rows_have_ended(pair):
    _, stage = pair
    steps = []
    assert greedy(stage, PROMPTS, max_new_tokens=9, is_done=lambda new: len(new) == 3, on_step=lambda: steps.append(1))
    assert len(steps) == 3
    assert greedy(stage, PROMPTS, max_new_tokens=0) == [[], [], []]
