"""What of a text is judged, and how: against a model that was trained, and one that is made up."""

import itertools
import math
import random

import pytest
import torch
from moderation_rule import RULE, FakeEngine, sentence
from transformers import AutoModelForCausalLM

from openchatkit.data.stores.tokenise import separator_ids, tokenise
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import moderation
from openchatkit.formats.token_store import CONTEXT, TRAINED
from openchatkit.inference.engine.engine import Engine
from openchatkit.inference.moderation.scorer import LabelScorer, UnjudgedError

LABELS = moderation.LABELS
EVEN = (0.2,) * 5


@pytest.fixture(scope="module")
def tokenizer(moderation_tokenizer):
    return Tokenizer(moderation_tokenizer)


@pytest.fixture(scope="module")
def model(moderation_model):
    return AutoModelForCausalLM.from_pretrained(moderation_model).eval()


def engine(model) -> Engine:
    return Engine(model, eos_ids=[0], device=torch.device("cpu"))


def label(probabilities) -> str:
    return LABELS[probabilities.index(max(probabilities))]


def test_a_trained_model_gives_each_text_its_label(model, tokenizer):
    scorer = LabelScorer(engine(model), tokenizer)
    draw = random.Random(1)
    for word, expected in (*RULE, (None, "casual")):
        for _ in range(5):
            (scores,) = scorer.score(sentence(draw, word))
            assert label(scores.probabilities) == expected
            assert sum(scores.probabilities) == pytest.approx(1)
            assert scores.share > 0.9


def test_probabilities_are_those_of_the_whole_labels(model, tokenizer):
    """Token by token from the model's logits, in the pieces that training has."""
    (scores,) = LabelScorer(engine(model), tokenizer).score("we steal a mat")
    logs = []
    for name in LABELS:
        segments = moderation.record([("we steal a mat", name)])
        pieces = tokenizer.encode([segment.text for segment in segments])
        ids = [token for piece in pieces for token in piece]
        with torch.inference_mode():
            after = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        first = len(ids) - len(pieces[-1])
        logs.append(sum(after[place - 1, ids[place]].item() for place in range(first, len(ids))))
    expected = torch.softmax(torch.tensor(logs), dim=0)
    assert torch.allclose(torch.tensor(scores.probabilities), expected, atol=1e-5)
    assert scores.share == pytest.approx(sum(map(math.exp, logs)), abs=1e-4)


def test_the_prompt_is_tokenised_as_training_tokenises_it(tokenizer):
    fake = FakeEngine(lambda prompt: EVEN)
    LabelScorer(fake, tokenizer).score("sit: on\nthe mat.")
    row = b'{"context": "sit: on\\nthe mat.", "safety_label": "__casual__"}'
    trained = tokenise([row], tokenizer.encode, separator_ids(tokenizer, "end-of-text"))
    prompt = trained.tokens[trained.mask == CONTEXT].tolist()
    assert fake.prompts == [prompt]
    assert tokenizer.decode(prompt) == moderation.prompt("sit: on the mat.")
    assert tokenizer.decode(trained.tokens[trained.mask == TRAINED].tolist()) == " casual<|endoftext|>"


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 28, 29, 100])
def test_windows_overlap_and_leave_nothing_out(tokenizer, length):
    text = " ".join(["cat"] * length)
    ids = tokenizer.encode([moderation.body(text)])[0]
    windows = LabelScorer(FakeEngine(lambda prompt: EVEN), tokenizer, window=16, overlap=4).windows(text)
    if not length:
        assert windows == []
        return
    assert all(0 < len(window) <= 16 for window in windows)
    joined = list(windows[0])
    for before, after in itertools.pairwise(windows):
        assert before[-4:] == after[:4]
        joined += after[4:]
    assert joined == ids


def test_a_bad_word_anywhere_in_a_long_text_is_found(model, tokenizer):
    scorer = LabelScorer(engine(model), tokenizer, window=16, overlap=4)
    words = sentence(random.Random(2), words=60).split()
    for place in (0, 13, 30, 59):
        text = " ".join([*words[:place], "bomb", *words[place + 1 :]])
        assert max(scores.probabilities[2] for scores in scorer.score(text)) > 0.5, place


def test_a_word_that_is_disguised_is_read_as_it_looks(model, tokenizer):
    scorer = LabelScorer(engine(model), tokenizer)
    for disguised in ("b\u200bo\u2060mb", "\uff42\uff4f\uff4d\uff42"):
        written, seen = scorer.score(f"we read {disguised} books")
        assert label(seen.probabilities) == "needs intervention"
        assert written != seen


def test_a_growing_text_is_judged_where_it_is_new(tokenizer):
    fake = FakeEngine(lambda prompt: EVEN)
    scorer = LabelScorer(fake, tokenizer, window=16, overlap=4)
    words = ["cat"] * 60
    for count in range(1, 61):
        assert len(scorer.score(" ".join(words[:count]))) == max(1, math.ceil((count - 4) / 12))
    assert len(fake.prompts) == len({tuple(prompt) for prompt in fake.prompts})
    asked = len(fake.prompts)
    scorer.score(" ".join(words))
    assert len(fake.prompts) == asked


def test_windows_fit_into_the_models_context(tokenizer):
    around = len(tokenizer.encode([moderation.prompt("")])[0])
    fake = FakeEngine(lambda prompt: EVEN, context_length=around + 64 + 40)
    LabelScorer(fake, tokenizer).score("cat " * 500)
    longest = max(map(len, tokenizer.encode([f" {name}" for name in LABELS])))
    assert max(map(len, fake.prompts)) + longest <= fake.context_length
    with pytest.raises(UserError, match=r"reads 70 tokens at once, of which the moderation prompt takes \d+: expected"):
        LabelScorer(FakeEngine(lambda prompt: EVEN, context_length=70), tokenizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_no_judgement(tokenizer, bad, monkeypatch):
    fake = FakeEngine(lambda prompt: EVEN)
    monkeypatch.setattr(fake, "log_likelihoods", lambda prompt, labels: [-1.0, -2.0, bad, -3.0, -4.0])
    with pytest.raises(UnjudgedError, match="not a number"):
        LabelScorer(fake, tokenizer).score("cat")


def test_probabilities_far_below_what_exp_can_hold(tokenizer, monkeypatch):
    fake = FakeEngine(lambda prompt: EVEN)
    monkeypatch.setattr(fake, "log_likelihoods", lambda prompt, labels: [-5000.0, -5001.0, -9000.0, -9000.0, -9000.0])
    (scores,) = LabelScorer(fake, tokenizer).score("cat")
    assert scores.probabilities[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert scores.share == 0
