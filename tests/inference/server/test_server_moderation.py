"""A moderated reply reaches a client as OpenAI's API says it: with content_filter, and nothing that was not allowed."""

import pytest
from served import HELLO, Refusing

from openchatkit.inference.responder import Responder


@pytest.mark.parametrize("word", ["hello", "first"], ids=["question", "answer"])
def test_what_is_not_allowed_is_filtered(serve, trained, word):
    plain = trained.responder
    moderated = Responder(plain.engine, plain.tokenizer, plain.rendering, moderator=Refusing(word))
    with serve(moderated) as running:
        client = running.client()
        (choice,) = client.chat.completions.create(model="tiny", messages=HELLO).choices
        assert (choice.message.content, choice.finish_reason) == (Refusing.MESSAGE, "content_filter")
        chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == Refusing.MESSAGE
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        completed = client.completions.create(model="tiny", prompt="<human>: hello\n<bot>:").choices[0]
        assert (completed.text, completed.finish_reason) == (Refusing.MESSAGE, "content_filter")
