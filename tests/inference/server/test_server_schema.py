"""Whatever a client sends is a request that can be answered or an error that is the client's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.engine.sampling import Sampling, check
from openchatkit.inference.server import schema
from openchatkit.inference.server.fields import parse_json
from openchatkit.inference.server.responses import ApiError

SERVED = schema.ServedModel("tiny", Sampling(max_tokens=50), 100)
NAMES = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "passages",
    "n",
    "tools",
    "logprobs",
    "user",
    "other",
    "role",
    "content",
    "type",
    "text",
    "tool_calls",
    "function",
    "arguments",
    "other" * 200,
]
# As JSON allows it, lone surrogates too, with the words that mean something to us.
TEXTS = st.text(max_size=5) | st.sampled_from(["user", "assistant", "system", "tool", "text", "tiny", "\ud800"])
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, 1, 2, 0.5, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)
QUESTION = st.fixed_dictionaries({"role": st.just("user"), "content": st.just("hello")})
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(VALUES | QUESTION, max_size=3) | QUESTION.map(lambda message: [message])},
    optional={name: VALUES for name in NAMES if name != "messages"},
)


@given(BODIES)
def test_a_chat_is_answerable_or_refused(body):
    _answerable_or_refused(schema.parse_chat, body)


@given(BODIES.map(lambda body: {name: value for name, value in body.items() if name != "messages"}))
def test_a_completion_is_answerable_or_refused(body):
    _answerable_or_refused(schema.parse_completion, body)


def _answerable_or_refused(read, body: dict[str, object]) -> None:
    try:
        request = read(parse_json(json.dumps(body).encode()), SERVED)
    except ApiError as refused:
        error = refused
    else:
        error = None
    if error:
        assert error.status in (400, 404)
        assert len(json.dumps(error.body)) < 1000
        return
    check(request.sampling)
    assert 1 <= request.sampling.max_tokens <= SERVED.max_new_tokens
    assert all(request.stop)
    if isinstance(request.subject, Conversation):
        assert request.subject.open
        request.subject.turns[-1].text.encode()


@pytest.mark.parametrize("depth", range(500, 1100, 25))
def test_no_depth_is_a_defect(depth):
    body = b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(ApiError) as caught:
        schema.parse_chat(parse_json(body), SERVED)
    assert caught.value.status == 400
