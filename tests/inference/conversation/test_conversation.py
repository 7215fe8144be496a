"""Turns, the prompt made of them, and what of it fits into the context."""

import itertools
import re

import pytest

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.inference.conversation import context, conversation
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.conversation.rendering import KitRendering


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


def test_a_conversation_opens_with_the_date_by_default():
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
    before.undone()
    assert before.turns == turns


def test_the_last_question_can_be_taken_back_with_its_passages_or_without_a_reply():
    talk = Conversation("s").asked("one").answered("1").asked("two", ["passage"])
    for asked in (talk, talk.answered("2")):
        assert asked.last_question == Turn("human", "two", ("passage",))
        assert asked.undone() == Conversation("s").asked("one").answered("1")
    greeting = Conversation(turns=(Turn("bot", "Welcome"),))
    assert (greeting.last_question, greeting.undone()) == (None, greeting)


def test_a_system_text_is_changed_under_the_same_turns(rendering):
    talk = Conversation("Be kind.", preamble="Current Date: today\n\n").asked("Hi")
    assert rendering.text(talk) == "Current Date: today\n\nBe kind.\n\n<human>: Hi\n<bot>:"
    assert rendering.text(talk.with_system("\n Be brief.\n")) == (
        "Current Date: today\n\n Be brief.\n\n<human>: Hi\n<bot>:"
    )
    assert rendering.text(talk.with_system("")) == "Current Date: today\n\n<human>: Hi\n<bot>:"


def test_messages_make_a_conversation_and_are_made_of_it():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi", "passages": ["one"]},
        {"role": "assistant", "content": "Hello"},
    ]
    talk = conversation.from_messages(messages, preamble="today")
    assert talk == Conversation("Be kind.", preamble="today").asked("Hi", ["one"]).answered("Hello")
    assert talk.messages() == messages
    assert Conversation(preamble="today").messages() == []


def test_messages_that_do_not_alternate_are_turns_of_their_own_but_for_templates():
    messages = [
        {"role": "assistant", "content": "Welcome"},
        {"role": "user", "content": "one", "passages": ["p"], "name": "x"},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "two", "passages": ["q"]},
        {"role": "system", "content": "Be kind."},
        {"role": "system", "content": " "},
    ]
    talk = conversation.from_messages(messages)
    system, welcome = "Be brief.\n\nBe kind.", Turn("bot", "Welcome")
    assert talk == Conversation(system, (welcome, Turn("human", "one", ("p",)), Turn("human", "two", ("q",))))
    assert talk.as_read() == talk, "no reply has been made to either question"
    joined = Conversation(system, (welcome, Turn("human", "one\n\ntwo", ("p", "q"))))
    assert talk.alternating() == joined


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hi", "message 2 is not an object"),
        ({"role": "user"}, "the content of message 2 is not text"),
        ({"role": "user", "content": [{"type": "text", "text": "hi"}]}, "the content of message 2 is not text"),
        ({"role": "robot", "content": ""}, "message 2 has the role 'robot': expected system, user, assistant or tool"),
        ({"role": "assistant", "content": "", "tool_calls": {"a": 1}}, "the tool_calls of message 2 are not a list"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}, "a tool call of message 2 is not"),
        ({"role": "assistant", "content": None}, "the content of message 2 is not text"),
        ({"role": ["user"], "content": ""}, "message 2 has the role"),
        ({"content": ""}, "message 2 has the role 'None'"),
        ({"role": "assistant", "content": "", "passages": ["p"]}, "message 2 of the assistant has passages"),
        ({"role": "user", "content": "", "passages": "p"}, "the passages of message 2 are not a list of strings"),
        ({"role": "user", "content": "", "passages": [None]}, "the passages of message 2 are not a list of strings"),
    ],
)
def test_messages_that_are_none_are_named(message, error):
    with pytest.raises(UserError, match=error):
        conversation.from_messages([{"role": "system", "content": "s"}, message])


CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def test_calls_of_tools_and_their_results_are_text(rendering):
    talk = conversation.to_answer(
        [
            {"role": "user", "content": "Is it warm?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
            {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"},
            {"role": "tool", "tool_call_id": "c3", "content": "none"},
            {"role": "assistant", "content": "So so.", "function_call": {"name": "stop", "arguments": {"now": True}}},
            {"role": "function", "name": "stop", "content": "done"},
        ]
    )
    assert rendering.text(talk) == (
        '<human>: Is it warm?\n<bot>: Calling get_weather({"city": "Paris"})\nCalling get_weather({"city": "Paris"})\n'
        "<human>: Result of get_weather:\n18 degrees\n\nResult of a tool:\nnone\n"
        '<bot>: So so.\n\nCalling stop({"now": true})\n<human>: Result of stop:\ndone\n<bot>:'
    )


def test_a_reply_that_is_begun_is_the_end_of_the_prompt(rendering, encode):
    messages = [
        {"role": "user", "content": "Hi", "passages": ["one"]},
        {"role": "assistant", "content": "Hello <bot> "},
    ]
    talk = conversation.to_answer(messages)
    assert (talk.open, talk.begun) == (True, "Hello <bot> ")
    assert rendering.text(talk) == "<human>: Passages:\n> one\n\nHi\n<bot>: Hello <bot> "
    assert rendering.text(talk.answered("you")).endswith("<bot>: Hello <bot> you\n")
    plain = encode(Conversation().asked("Hi", ["one"]))
    assert encode(talk)[: len(plain)] == plain
    for nothing in ("", " \n"):
        assert encode(conversation.to_answer([messages[0], {"role": "assistant", "content": nothing}])) == plain
    with pytest.raises(UserError, match="the messages have no question to answer"):
        conversation.to_answer(messages[1:])


def test_pairs_begin_with_questions():
    greeted = Conversation(turns=(Turn("bot", "Welcome"),)).asked("one").answered("1").asked("two")
    assert [[turn.text for turn in pair] for pair in greeted.exchanges()] == [["Welcome"], ["one", "1"], ["two"]]
    assert [turn.text for turn in greeted.without_oldest(1).turns] == ["one", "1", "two"]
    assert Conversation().exchanges() == []


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
    # A last turn that is long itself leaves its reply what there is.
    fitted = context.fit(long_chat, encode=encode, sizes=sizes, context_length=least + 1, max_tokens=11)
    assert (fitted.dropped, len(fitted.tokens), fitted.roomy) == (4, least, False)
    with pytest.raises(UserError, match=f"this needs {least} tokens and leaves none of the {least} that this model"):
        context.fit(long_chat, encode=encode, sizes=sizes, context_length=least, max_tokens=11)


def test_a_long_reply_is_kept_no_more_than_a_quarter_of_the_context_free(encode, sizes, long_chat):
    size = len(encode(long_chat))
    length = size + size // 3 + 1
    fitted = context.fit(long_chat, encode=encode, sizes=sizes, context_length=length, max_tokens=10**9)
    assert (fitted.dropped, fitted.roomy) == (0, True)
    fitted = context.fit(long_chat, encode=encode, sizes=sizes, context_length=size + 9, max_tokens=10**9)
    assert 0 < fitted.dropped < 4
    assert context.reserve(10**9, 1024) == 256
    assert context.reserve(128, 1024) == 128
    assert context.reserve(5, 3) == 1


def test_the_cut_moves_only_once_in_a_while_and_every_prompt_in_between_adds_to_the_one_before(encode, sizes):
    talk, cuts, before, kept = Conversation(system="Be kind."), [], [], 0
    for number in range(120):
        asked = talk.asked(f"question {number} " + "on " * (number % 5))
        fitted = context.fit(asked, encode=encode, sizes=sizes, context_length=1200, max_tokens=100)
        assert len(fitted.tokens) <= 1100
        assert fitted.tokens == encode(fitted.conversation)
        if cuts and fitted.dropped == cuts[-1]:
            kept += fitted.tokens[: len(before)] == before
        cuts.append(fitted.dropped)
        before = fitted.tokens
        talk = asked.answered(f"the answer is {number}")
    moves = [later - earlier for earlier, later in itertools.pairwise(cuts)]
    assert min(moves) == 0
    # A pair takes about 50 tokens, a stride 275.
    assert 10 < sum(move > 0 for move in moves) < 30
    assert kept == len(moves) - sum(move > 0 for move in moves)
    # A function of the conversation alone: whoever asks about the middle of it gets the same answer.
    again = context.fit(talk, encode=encode, sizes=sizes, context_length=1200, max_tokens=100)
    assert again == context.fit(talk, encode=encode, sizes=sizes, context_length=1200, max_tokens=100)


def test_fitting_a_long_conversation_reads_each_turn_a_few_times_only(rendering):
    talk = Conversation()
    for number in range(500):
        talk = talk.asked(f"question {number}").answered(f"answer {number}")
    read = []

    def counted(encode):
        def encoded(what):
            read.append(len(what.turns) if isinstance(what, Conversation) else len(what))
            return encode(what)

        return encoded

    fitted = context.fit(
        talk.asked("the last"),
        encode=counted(rendering.tokens),
        sizes=counted(rendering.sizes),
        context_length=300,
        max_tokens=50,
    )
    assert fitted.dropped > 450
    assert sum(read) < 2.2 * 1001


def test_a_size_that_was_guessed_too_large_only_costs_another_look(encode, long_chat):
    limits = {"context_length": len(encode(long_chat)) - 40, "max_tokens": 1}
    fitted = context.fit(long_chat, encode=encode, sizes=lambda turns: [1000] * len(turns), **limits)
    assert 1 < fitted.dropped < 4
    assert len(fitted.tokens) + 1 <= limits["context_length"]
