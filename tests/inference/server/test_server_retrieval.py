"""The server looks questions up where it has an index, unless a request says not, and says what it found."""

import pytest
from served import CHAT, Broken

from openchatkit.inference.retrieval.retriever import Retriever
from openchatkit.retrieval.passage import Passage

SAY = [{"role": "user", "content": "say it"}]


class Red:
    """Finds one passage."""

    def search(self, query: str, k: int) -> list[Passage]:
        return [Passage("red", "", "colours.txt", "line 2", 0.123456, 7)]


@pytest.fixture(scope="module")
def looking(serve, trained):
    with serve(trained.responder, retriever=Retriever(Red(), k=3)) as running:
        yield running


def test_sources_come_with_the_reply_and_with_the_last_chunk(looking):
    source = {"number": 1, "title": "", "source": "colours.txt", "place": "line 2", "score": 0.1235, "text": "red"}
    client = looking.client()
    whole = client.chat.completions.create(model="tiny", messages=SAY)
    assert whole.choices[0].message.content == "日本 red"
    assert whole.sources == [source]
    chunks = list(client.chat.completions.create(model="tiny", messages=SAY, stream=True))
    assert [getattr(chunk, "sources", None) for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].sources == [source]


def test_a_request_can_say_not_to_look(looking):
    without = looking.client().chat.completions.create(model="tiny", messages=SAY, extra_body={"retrieval": False})
    assert without.choices[0].message.content == "日本 nothing"
    assert not hasattr(without, "sources")
    hello = looking.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert hello.sources == []


def test_passages_of_the_request_stand_first(looking):
    body = {"messages": SAY, "passages": ["blue"]}
    status, answer = looking.ask(CHAT, body)
    assert (status, [source["text"] for source in answer["sources"]]) == (200, ["blue", "red"])


def test_a_server_without_an_index(trained):
    status, answer = trained.ask(CHAT, {"messages": SAY, "retrieval": True})
    assert (status, answer["error"]["param"]) == (400, "retrieval")
    assert answer["error"]["message"].startswith("retrieval is true: this server was started without --retrieval")
    assert "sources" not in trained.ask(CHAT, {"messages": SAY, "retrieval": False})[1]
    assert trained.ask(CHAT, {"messages": SAY, "retrieval": "yes"})[0] == 400
    assert trained.ask("/v1/completions", {"prompt": "x", "retrieval": True})[0] == 400
    assert trained.ask("/v1/completions", {"prompt": "x", "retrieval": False, "max_tokens": 1})[0] == 200


def test_a_search_that_fails_is_logged_and_the_question_answered(serve, trained, capfd):
    with serve(trained.responder, retriever=Retriever(Broken(), k=3)) as running:
        status, answer = running.ask(CHAT, {"messages": SAY})
    assert (status, answer["sources"]) == (200, [])
    assert answer["note"] == "passages are missing: the server's log says why"
    assert answer["choices"][0]["message"]["content"] == "日本 nothing"
    assert "no passages were looked up: the index is gone" in capfd.readouterr().err


def test_a_search_that_fails_is_logged_where_the_question_is_too_long_to_be_answered(serve, trained, capfd):
    with serve(trained.responder, retriever=Retriever(Broken(), k=3)) as running:
        status, answer = running.ask(CHAT, {"messages": [{"role": "user", "content": "say it " * 1000}]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "no passages were looked up: the index is gone" in capfd.readouterr().err
