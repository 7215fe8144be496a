"""What is searched for: the question, the one before it with it, or nothing."""

import pytest

from openchatkit.formats.chat import Turn
from openchatkit.inference.retrieval.queries import queries

BEFORE = "Who discovered penicillin in London?"


def turns(*questions: str) -> list[Turn]:
    chat = [turn for question in questions[:-1] for turn in (Turn("human", question), Turn("bot", "It says so."))]
    return [*chat, Turn("human", questions[-1])]


@pytest.mark.parametrize("text", ["hello", "Hi!", "Thank you!", "ok, thanks", "?!", "   "])
def test_a_mere_greeting_is_not_searched_for(text):
    assert queries(turns(text)) == []
    assert queries(turns(BEFORE, text)) == []


@pytest.mark.parametrize(
    "text",
    ["How much is the fine?", "Which well is right?", "What is a hello?", "Thanks, that's great.", "Good morning!"],
)
def test_whether_words_of_small_talk_are_small_talk_is_for_the_index_to_say(text):
    assert queries(turns(text)) == [text]
    assert queries(turns(BEFORE, text)) == [text]


@pytest.mark.parametrize("text", ["Where is the mine?", "What is a will?", "Who can do that?"])
def test_words_that_hardly_ever_say_something_are_tried_when_nothing_else_is_found(text):
    assert queries(turns(text)) == [text]
    assert queries(turns(BEFORE, text)) == [f"{BEFORE}\n{text}", text]


@pytest.mark.parametrize("text", ["Why?", "And who else?", "Tell me more about it", "what does this mean"])
def test_what_says_nothing_is_searched_for_behind_the_last_question_that_does(text):
    assert queries(turns(text)) == [text]
    assert queries(turns(BEFORE, text)) == [f"{BEFORE}\n{text}", text]
    assert queries(turns(BEFORE, "Why?", text)) == [f"{BEFORE}\n{text}", text]


def test_a_short_question_that_points_back_is_searched_for_behind_the_last():
    assert queries(turns(BEFORE, "When did he die?")) == [f"{BEFORE}\nWhen did he die?"]
    assert queries(turns("When did he die?")) == ["When did he die?"]


def test_a_short_question_of_its_own_is_tried_alone_first():
    assert queries(turns(BEFORE, "What does json.dumps do?")) == [
        "What does json.dumps do?",
        f"{BEFORE}\nWhat does json.dumps do?",
    ]


def test_a_long_question_stands_for_itself():
    text = "Which of these planets has more moons than it has rings around the equator?"
    assert queries(turns(BEFORE, text)) == [text]


@pytest.mark.parametrize("text", ["Qui a découvert la pénicilline ?", "谁发现了青霉素", "json"])
def test_other_words_are_searched_for_as_they_stand(text):
    assert queries(turns(text)) == [text]
