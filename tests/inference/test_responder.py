"""Replies to conversations: what ends them, what stops them early, and what a moderator lets through."""

import json
import shutil
from functools import partial

import pytest
import torch

from openchatkit.errors import UserError
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.conversation.rendering import KitRendering
from openchatkit.inference.engine.engine import Engine
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.loading import loader
from openchatkit.inference.moderation.moderator import Verdict
from openchatkit.inference.responder import Responder

GREEDY = Sampling(max_tokens=30, sample=False)
HELLO = Conversation().asked("hello")


class Script:
    """An engine that yields given tokens, and records whether it was closed."""

    context_length = None

    def __init__(self, tokens):
        self.tokens, self.closed, self.prompts = tokens, False, []

    def generate(self, prompt, sampling, generator=None, *, statistics=None, lookup=False, cancelled=None):
        self.prompts.append((list(prompt), lookup))
        try:
            yield from self.tokens[: sampling.max_tokens]
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    from openchatkit.data.tokenizer import Tokenizer

    return Tokenizer(tiny_tokenizer)


@pytest.fixture
def says(tokenizer):
    """A responder whose model says a text."""

    def make(text, moderator=None, **changes):
        pieces = [token for character in text for token in tokenizer.encode([character])[0]]
        rendering = KitRendering(tokenizer)
        for name, value in changes.items():
            setattr(rendering, name, value)
        return Responder(Script(pieces), tokenizer, rendering, moderator=moderator)

    return make


@pytest.fixture
def llama_like(tiny_tokenizer, tmp_path):
    """The folder of a tokenizer that puts a token for the beginning before every text, and one for the end after it."""
    folder = tmp_path / "llama_like"
    shutil.copytree(tiny_tokenizer, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    begin, end = content["added_tokens"]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": begin["content"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": end["content"], "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
            for token in (begin, end)
        },
    }
    file.write_text(json.dumps(content))
    return folder


def test_the_beginning_of_a_text_is_the_token_that_transformers_puts_there(llama_like, tiny_tokenizer):
    from transformers import AutoTokenizer

    from openchatkit.data.tokenizer import Tokenizer

    tokenizer, theirs = Tokenizer(llama_like), AutoTokenizer.from_pretrained(llama_like)
    assert (tokenizer.prefix, Tokenizer(tiny_tokenizer).prefix) == ((0,), ())
    responder = Responder(Script([5]), tokenizer, KitRendering(tokenizer))
    for text in ("The answer", "What does it say?\n"):
        responder.answer(text, LONG)
        assert responder.engine.prompts[-1][0] == theirs(text)["input_ids"][:-1]
        assert theirs(text)["input_ids"][0] == theirs.bos_token_id == 0
    responder.answer(HELLO, LONG)
    assert responder.engine.prompts[-1][0] == theirs("<human>: hello\n<bot>:")["input_ids"][:-1]
    assert responder.rendering.text(HELLO) == "<|endoftext|><human>: hello\n<bot>:"
    # A text cannot write the token, and none of it is repeated by what a user types.
    responder.answer("<|endoftext|>", LONG)
    assert responder.engine.prompts[-1][0].count(0) == 1
    with pytest.raises(UserError, match="the prompt is empty"):
        responder.answer("", LONG)


def test_a_model_that_this_kit_trained_reads_what_it_was_trained_on(llama_like):
    from openchatkit.data.tokenizer import Tokenizer
    from openchatkit.formats.tokenizer_files import add_chat_template

    add_chat_template(llama_like)
    tokenizer = Tokenizer(llama_like)
    ids = KitRendering(tokenizer).tokens(HELLO)
    assert ids == tokenizer._loaded.apply_chat_template(
        HELLO.messages(), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids[0] != 0


LONG = Sampling(max_tokens=1000, sample=False)


def test_stop_strings_of_the_callers_end_a_reply_too(says):
    stops = ["never", "END", "\n\n", "x" * 50, "ND"]
    reply = says("so it is EEND of it").answer(HELLO, LONG, stop=stops)
    assert (reply.text, reply.finish) == ("so it is E", "end")
    assert says("one\n\ntwo").answer(HELLO, LONG, stop=stops).text == "one"
    assert says("one\n<human>: two").answer(HELLO, LONG, stop=stops).text == "one"
    assert says("one\n<human").answer(HELLO, LONG).text == "one\n<human"
    with pytest.raises(UserError, match="a stop string is empty"):
        says("one").answer(HELLO, LONG, stop=["a", ""])
    with pytest.raises(UserError, match="a stop string is empty"):
        says("one").answer("hello", LONG, stop=[""])


def test_a_special_token_of_the_rendering_ends_a_reply(says):
    responder = says("one", stop_ids=frozenset({1}))
    responder.engine.tokens += [1, *responder.engine.tokens]
    reply = responder.answer(HELLO, LONG)
    assert (reply.text, reply.finish, reply.tokens[-1]) == ("one", "end", 1)
    assert responder.engine.closed


def test_the_length_ends_a_reply(says):
    reply = says("abcdef").answer(HELLO, Sampling(max_tokens=3))
    assert (reply.text, reply.finish) == ("abc", "length")


def test_a_reply_that_is_begun_goes_on_without_being_trimmed_at_its_start(says, tokenizer):
    talk = Conversation().asked("hello").answered("yes").asked("and?")
    responder = says(" on\n<human>: no")
    reply = responder.answer(Conversation(turns=talk.turns, begun="It goes"), LONG)
    assert (reply.text, reply.finish) == (" on", "end")
    assert tokenizer.decode(responder.engine.prompts[-1][0]).endswith("<human>: and?\n<bot>: It goes")
    assert says(" on").answer(talk, LONG).text == "on"


def test_what_is_begun_is_judged_with_what_follows(says):
    begun = Conversation(turns=HELLO.turns, begun="It is b")
    reply = says("ad.", Forbidding("bad")).answer(begun, LONG)
    assert (reply.text, reply.finish) == ("Not this.", "moderated")
    responder = says("so.", Forbidding("It is b"))
    assert (responder.answer(begun, LONG).refused, responder.engine.prompts) == (True, [])


def test_a_conversation_that_ends_with_a_reply_cannot_be_answered(says):
    for talk in (Conversation(), HELLO.answered("yes")):
        with pytest.raises(UserError, match="the conversation ends with a reply: expected a question"):
            says("one").answer(talk, GREEDY)
    with pytest.raises(UserError, match="the prompt is empty"):
        says("one").answer("", GREEDY)


def test_passages_are_reported_and_turn_lookup_on(says):
    responder = says("one")
    reply = responder.answer(HELLO.answered("yes").asked("and?", ["p"]), LONG)
    assert reply.passages == ("p",)
    assert responder.answer(HELLO, LONG).passages == ()
    assert [lookup for _, lookup in responder.engine.prompts] == [True, False]


def test_a_reply_that_was_cancelled_before_it_began_reads_nothing(says):
    responder = says("one")
    reply = responder.answer(HELLO, LONG, cancelled=lambda: True)
    assert (reply.text, reply.finish, reply.tokens) == ("", "interrupted", ())
    assert responder.engine.prompts == []


def test_a_reply_that_is_cancelled_ends_with_its_token(says):
    responder, seen = says("abcdef"), []
    reply = responder.answer(HELLO, LONG, emit=seen.append, cancelled=lambda: len(seen) == 2)
    assert (reply.text, reply.finish, "".join(seen)) == ("ab", "interrupted", "ab")
    assert responder.engine.closed


def test_a_reply_that_is_cancelled_while_a_long_prompt_is_read_never_begins(random_models, tokenizer, monkeypatch):
    loaded = loader.load(str(random_models["neox"]))
    engine = Engine(loaded.model, eos_ids=(), device=loaded.device, chunk=16)
    responder = Responder(engine, tokenizer, KitRendering(tokenizer))
    passes = []
    monkeypatch.setattr(loaded.model, "forward", partial(_counted, passes, loaded.model.forward))
    talk = Conversation().asked("word " * 60)
    reply = responder.answer(talk, GREEDY, cancelled=lambda: len(passes) == 2)
    assert (reply.text, reply.finish, reply.tokens, passes) == ("", "interrupted", (), [16, 16])
    assert reply.statistics.prompt_tokens > 48
    # What was read of it is not read again.
    again = responder.answer(talk, GREEDY)
    assert (again.finish, again.statistics.cached_tokens) == ("length", 32)


def _counted(passes, forward, **inputs):
    passes.append(inputs["input_ids"].shape[1])
    return forward(**inputs)


def test_an_emit_that_fails_closes_the_engine(says):
    def fail(text):
        raise BrokenPipeError

    responder = says("abc")
    with pytest.raises(BrokenPipeError):
        responder.answer(HELLO, LONG, emit=fail)
    assert responder.engine.closed


class Forbidding:
    """Forbids what has a word in it; answers are forbidden by the message of the word alone."""

    def __init__(self, word):
        self.word, self.asked = word, []

    def check(self, question, answer=None):
        self.asked.append((question, answer))
        return Verdict(self.word not in (question if answer is None else answer), "label", "Not this.")


def test_a_question_that_is_not_allowed_is_not_answered(says):
    responder, seen = says("one", Forbidding("hello")), []
    for reply in (
        responder.answer(HELLO, LONG, emit=seen.append),
        responder.answer(Conversation().asked("and?", ["hello"]), LONG, emit=seen.append),
        responder.answer("hello", LONG, emit=seen.append),
    ):
        assert (reply.text, reply.finish, reply.refused, reply.tokens) == ("Not this.", "moderated", True, ())
        assert reply.verdict.label == "label"
    assert seen == ["Not this."] * 3
    assert responder.engine.prompts == []


def test_a_system_text_that_is_not_allowed_is_not_answered(says):
    responder = says("one", Forbidding("bad"))
    reply = responder.answer(HELLO.with_system("Be bad."), LONG)
    assert (reply.text, reply.refused, responder.engine.prompts) == ("Not this.", True, [])
    assert responder.answer(HELLO.with_system("Be good."), LONG).text == "one"


def test_earlier_questions_that_are_not_allowed_are_not_read(says, tokenizer):
    responder = says("one", Forbidding("bad"))
    talk = Conversation().asked("is it?").answered("yes").asked("be bad").answered("no").asked("hello")
    assert responder.answer(talk, LONG).text == "one"
    expected = "<human>: is it?\n<bot>: yes\n<human>: hello\n<bot>:"
    assert tokenizer.decode(responder.engine.prompts[-1][0]) == expected


def test_a_reply_that_is_not_allowed_ends_where_it_is_judged(says):
    responder, seen = says("It is good. It is bad. It goes on.", Forbidding("bad")), []
    reply = responder.answer(HELLO, LONG, emit=seen.append)
    assert (reply.text, reply.finish, reply.refused) == ("It is good.\n\nNot this.", "moderated", False)
    assert "".join(seen) == reply.text
    assert len(reply.tokens) < len(responder.engine.tokens)
    assert responder.engine.closed
    reply = says(" It is bad", Forbidding("bad")).answer("hello", LONG)
    assert (reply.text, reply.finish) == ("Not this.", "moderated")


def test_a_reply_that_is_allowed_is_whole_and_was_judged_whole(says):
    moderator, seen = Forbidding("bad"), []
    reply = says("One. Two.\nthree\n<human>: bad", moderator).answer(HELLO, LONG, emit=seen.append)
    assert (reply.text, reply.finish, "".join(seen)) == ("One. Two.\nthree", "end", "One. Two.\nthree")
    assert moderator.asked[0] == ("hello", None)
    assert moderator.asked[-1] == ("hello", "One. Two.\nthree")
    assert len(seen) > 1
    assert says("abcdef", moderator).answer(HELLO, Sampling(max_tokens=3)).finish == "length"


def test_what_was_not_judged_when_a_reply_is_interrupted_is_not_shown(says):
    calls = []
    reply = says("One. Two th", Forbidding("x")).answer(
        HELLO, LONG, cancelled=lambda: calls.append(1) or len(calls) > 8
    )
    assert (reply.text, reply.finish) == ("One.", "interrupted")

    class Interrupting:
        def check(self, question, answer=None):
            if answer:
                raise KeyboardInterrupt
            return Verdict(True)

    reply = says("One. Two", Interrupting()).answer(HELLO, LONG)
    assert (reply.text, reply.finish) == ("", "interrupted")


def test_a_long_line_is_refused_or_read_without_trouble(trained_model, tokenizer):
    from transformers import AutoModelForCausalLM

    from openchatkit.inference.engine.engine import Engine

    model = AutoModelForCausalLM.from_pretrained(trained_model).eval()
    engine = Engine(model, eos_ids=[0], device=torch.device("cpu"))
    responder = Responder(engine, tokenizer, KitRendering(tokenizer))
    with pytest.raises(UserError, match=r"this needs \d+ tokens and leaves none of the 192"):
        responder.answer(HELLO.answered("first").asked("word " * 200_000), GREEDY)
    with pytest.raises(UserError, match=r"this needs \d+ tokens and leaves none of the 192"):
        responder.answer(HELLO.answered("word " * 200_000).asked("word " * 200_000), GREEDY)


def test_the_end_of_the_context_ends_a_reply_by_its_length(random_models, tokenizer):
    loaded = loader.load(str(random_models["neox"]))
    engine = Engine(loaded.model, eos_ids=(), device=loaded.device)
    responder = Responder(engine, tokenizer, KitRendering(tokenizer))
    talk = Conversation().asked("word " * 100)
    size = len(responder.rendering.tokens(talk))
    assert 300 < size < 512
    for reply in (
        responder.answer(talk, Sampling(max_tokens=1000, sample=False)),
        responder.answer(responder.rendering.text(talk), Sampling(max_tokens=1000, sample=False)),
    ):
        assert (reply.finish, len(reply.tokens), reply.dropped) == ("length", 512 - size + 1, 0)


def test_a_long_reply_that_is_allowed_costs_no_history(random_models, tokenizer):
    loaded = loader.load(str(random_models["neox"]))
    responder = Responder(
        Engine(loaded.model, eos_ids=loaded.eos_ids, device=loaded.device), tokenizer, KitRendering(tokenizer)
    )
    talk = Conversation()
    for number in range(8):
        talk = talk.asked(f"question {number} of some words").answered("and its answer")
    size = len(responder.rendering.tokens(talk.asked("and now?")))
    assert 200 < size < 384
    assert responder.fit(talk.asked("and now?"), Sampling(max_tokens=500)).dropped == 0
