"""Turns, the prompt made of them, and what of it fits into the context."""

import re

import pytest

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.inference import context, conversation
from openchatkit.inference.conversation import Conversation
from openchatkit.inference.rendering import KitRendering


@pytest.fixture(scope="module")
def rendering(tiny_tokenizer) -> KitRendering:
    return KitRendering(Tokenizer(tiny_tokenizer))


@pytest.fixture
def encode(rendering):
    return rendering.tokens


@pytest.fixture
def sizes(rendering):
    return rendering.sizes


@pytest.fixture
def long_chat() -> Conversation:
    talk = Conversation(system="Be kind.")
    for number in range(4):
        talk = talk.asked(f"question {number}").answered(f"answer {number}")
    return talk.asked("the last question", ["a passage"])


def test_a_conversation_opens_with_the_date_unless_told_not_to():
    assert re.fullmatch(
        r"Current Date: \d{4}-\d\d-\d\d\nCurrent Time: \d\d:\d\d:\d\d [AP]M \S+\n\n", conversation.begin().preamble
    )
    assert conversation.begin(date=False) == Conversation()


def test_asking_and_answering_make_the_prompt(rendering):
    talk = Conversation(system="Be kind.").asked("Hi").answered("Hello").asked("What?", ["one", "two"])
    assert rendering.text(talk) == (
        "Be kind.\n\n<human>: Hi\n<bot>: Hello\n<human>: Passages:\n> one\n> two\n\nWhat?\n<bot>:"
    )


def test_a_passage_is_forgotten_with_the_reply_to_its_question(rendering):
    talk = Conversation().asked("What?", ["one"]).answered("That.")
    assert rendering.text(talk) == "<human>: What?\n<bot>: That.\n"


def test_a_conversation_is_a_value():
    before = Conversation().asked("Hi").answered("Hello")
    turns = before.turns
    before.asked("More").answered("No")
    assert before.turns == turns


def test_nothing_goes_while_all_fits(encode, sizes, long_chat):
    size = len(encode(long_chat))
    fitted = context.fit(long_chat, encode=encode, sizes=sizes, context_length=size + 10, max_tokens=10)
    assert (fitted.conversation, fitted.dropped, len(fitted.tokens)) == (long_chat, 0, size)
    assert context.fit(long_chat, encode=encode, sizes=sizes, context_length=None, max_tokens=10**9).dropped == 0


def test_the_oldest_pairs_go_and_system_text_and_last_turn_stay(encode, sizes, long_chat):
    size = len(encode(long_chat))
    fitted = context.fit(long_chat, encode=encode, sizes=sizes, context_length=size + 9, max_tokens=10)
    # One pair would have been enough; the cut moves by a quarter of the room at once.
    assert fitted.dropped == 2
    assert [turn.text for turn in fitted.conversation.turns][:2] == ["question 2", "answer 2"]
    assert fitted.tokens == encode(fitted.conversation)
    least = len(encode(Conversation(system="Be kind.").asked("the last question", ["a passage"])))
    fitted = context.fit(long_chat, encode=encode, sizes=sizes, context_length=least + 10, max_tokens=10)
    assert fitted.dropped == 4
    assert chat.render_text(fitted.conversation.turns) == (
        "<human>: Passages:\n> a passage\n\nthe last question\n<bot>:"
    )
    with pytest.raises(
        UserError, match=f"this needs {least} tokens and its reply up to 11 .*more than the {least + 10} "
    ):
        context.fit(long_chat, encode=encode, sizes=sizes, context_length=least + 10, max_tokens=11)
