"""What OpenAI's own client is answered: replies, streams, and errors of the classes that it knows."""

import json

import openai
import pytest
from served import CHAT, HELLO, Running, post, wait_until

from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.server.worker import ReplyJob


@pytest.fixture(scope="session")
def random_server(serve, random_models):
    with serve(random_models["neox"], sampling=Sampling(max_tokens=12)) as running:
        yield running


@pytest.fixture(scope="module")
def at_once(serve, trained):
    """A server that sends each piece of a stream as it comes."""
    with serve(trained.responder, pace=0.0) as running:
        yield running


def say(running: Running, *contents: object, **fields: object):
    """A whole reply to a chat of these contents, the user's and the assistant's in alternation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return running.client().chat.completions.create(model="tiny", messages=messages, **fields)


# -- replies


def test_a_reply_says_what_it_took(trained):
    reply = say(trained, "hello")
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "first", "stop")
    assert reply.usage.prompt_tokens == 13
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert say(trained, "hello").usage.prompt_tokens_details.cached_tokens > 0


def test_the_conversation_is_the_clients_and_its_replies_can_be_sent_back_as_they_came(trained):
    message = say(trained, "hello").choices[0].message.model_dump()
    messages = [*HELLO, message, *HELLO]
    reply = trained.client().chat.completions.create(model="tiny", messages=messages)
    assert reply.choices[0].message.content == "again"
    assert say(trained, "hello").choices[0].message.content == "first"


def test_a_content_may_be_text_parts(trained):
    assert say(trained, [{"type": "text", "text": "hello"}]).choices[0].message.content == "first"


def test_a_message_may_name_who_speaks(trained):
    status, answer = trained.ask(CHAT, {"messages": [{**HELLO[0], "name": "planner"}]})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "first")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_text_is_read_first(trained, role):
    messages = [{"role": role, "content": "Be brief."}, *HELLO]
    reply = trained.client().chat.completions.create(model="tiny", messages=messages)
    assert reply.usage.prompt_tokens > 13


def test_passages_belong_to_the_last_question(trained):
    assert say(trained, "say it", extra_body={"passages": ["red"]}).choices[0].message.content == "日本 red"
    body = {"messages": [{"role": "user", "content": "say it", "passages": ["blue"]}]}
    status, answer = trained.ask(CHAT, body)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "日本 blue")


def test_a_stream_is_the_reply_in_pieces(at_once, monkeypatch):
    emit = ReplyJob.emit

    def emit_and_wait(self: ReplyJob, text: str) -> None:
        """A model this small may make all tokens before the event loop looks: here it waits for each to be taken."""
        emit(self, text)
        wait_until(lambda: not self._text)

    monkeypatch.setattr(ReplyJob, "emit", emit_and_wait)
    stream = at_once.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "say it"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"passages": ["red"]},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(pieces) == "日本 red"
    assert len(pieces) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 2
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_that_comes_faster_than_the_pace_is_sent_together(serve, trained):
    with serve(trained.responder, pace=60.0) as running:
        stream = say(running, "say it", stream=True, extra_body={"passages": ["red"]})
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == "日本 red"
    assert sum(map(bool, pieces)) <= 2  # the first at once, the rest when the reply is done


def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(trained):
    body = {"messages": HELLO, "stream": True}
    answer = trained.send(post(CHAT, body)).decode()
    assert "content-type: text/event-stream" in answer.lower()
    assert "data: [DONE]\n\n" in answer
    assert "usage" not in answer


def test_a_completion_goes_on_from_a_text_as_it_stands(trained):
    prompt = "<human>: hello\n<bot>:"
    client = trained.client()
    for given in (prompt, [prompt]):
        whole = client.completions.create(model="tiny", prompt=given)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (" first", "stop")
    stream = client.completions.create(model="tiny", prompt=prompt, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " first"


def test_a_reply_ends_at_its_longest_length_and_at_stop_strings(trained):
    short = say(trained, "hello", max_tokens=2).choices[0]
    assert short.finish_reason == "length"
    assert "first".startswith(short.message.content)
    assert say(trained, "hello", max_completion_tokens=2).usage.completion_tokens == 2
    for stop in ("rs", ["nothing", "rs"]):
        reply = say(trained, "hello", stop=stop).choices[0]
        assert (reply.message.content, reply.finish_reason) == ("fi", "stop")


def test_a_seed_repeats_a_reply(random_server):
    texts = [say(random_server, "hello", seed=seed, temperature=2).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_settings_of_a_request_are_used(random_server):
    greedy = say(random_server, "hello", temperature=0).choices[0].message.content
    for name, value in (("top_k", 1), ("min_p", 1), ("temperature", 0)):
        reply = say(random_server, "hello", extra_body={name: value}, seed=5)
        assert reply.choices[0].message.content == greedy
    assert say(random_server, "hello", top_p=1e-9, seed=5).choices[0].message.content == greedy
    extra = {"repetition_penalty": 100}
    assert say(random_server, "hello", temperature=0, extra_body=extra).choices[0].message.content != greedy


def test_what_asks_for_nothing_is_accepted(trained):
    nothing = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False}
    nothing |= {"tools": [], "response_format": {"type": "text"}, "stop": None, "seed": None, "user": "someone"}
    status, answer = trained.ask(CHAT, {"messages": HELLO, **nothing})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "first")


@pytest.mark.parametrize("most", [4096, -1, None, 10**30])
def test_a_reply_ends_with_its_turn_or_at_the_servers_longest_whatever_is_asked(trained, random_server, most):
    assert say(trained, "hello", max_tokens=most).choices[0].message.content == "first"
    longest = 12 if most is None else 100  # of this server's requests without max_tokens, and of all
    reply = say(random_server, "hello", max_tokens=most, temperature=0)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", longest)


def test_a_reply_that_meets_the_end_of_the_context_ends_by_its_length(serve, random_models):
    with serve(random_models["neox"], max_new_tokens=10_000) as running:
        reply = say(running, "word " * 60, "yes", "and?", max_tokens=-1)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == 513  # the last token need not be read
    assert not hasattr(reply.usage, "dropped_pairs")


def test_a_last_message_of_the_assistants_is_gone_on_with(trained):
    reply = say(trained, "hello", "fi").choices[0]
    assert (reply.message.content, reply.finish_reason) == ("rst", "stop")
    stream = say(trained, "hello", "first", "hello", "a", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "gain"


def test_tools_of_the_past_are_read(trained):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    reply = trained.client().chat.completions.create(model="tiny", messages=messages)
    parts = ["<human>: hello\n<bot>:", " Calling now({})\n<human>:", " Result of now:\nnoon\n<bot>:"]
    assert reply.usage.prompt_tokens == sum(map(len, trained.responder.tokenizer.encode(parts)))


@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_passed_over_and_named(trained, stream):
    nothing = {"ignore_eos": False, "top_k": -1, "stop": list("12345"), "min_tokens": 0, "top_logprobs": 0}
    passed = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}, "user": "someone"}
    messages = [{**HELLO[0], "name": "planner"}]
    answer = trained.send(post(CHAT, {"messages": messages, "stream": stream, "metadata": {}, **nothing, **passed}))
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    assert "x-ignored-fields: reasoning_effort, chat_template_kwargs, user, messages[].name\r\n" in head
    assert '"first"' in body or '"f' in body
    plain = trained.send(post(CHAT, {"messages": HELLO, **nothing})).decode()
    assert "x-ignored-fields" not in plain
    assert '"first"' in plain


def test_a_long_conversation_loses_its_oldest_questions_and_says_so(trained):
    reply = say(trained, *(["hello", "first"] * 30), "hello")
    assert reply.usage.dropped_pairs > 10


def test_the_model_can_be_looked_up(trained):
    client = trained.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "openchatkit"
    with pytest.raises(openai.NotFoundError, match=r'there is no model \\"an/other\\"|there is no model "an/other"'):
        client.models.retrieve("an/other")


# -- errors


def test_errors_are_of_the_clients_own_classes(trained):
    with pytest.raises(openai.BadRequestError) as caught:
        say(trained, "hello", n=2)
    assert (caught.value.param, caught.value.code) == ("n", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as caught:
        trained.client().chat.completions.create(model="gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        say(trained, "word " * 300)
    assert caught.value.code == "context_length_exceeded"
    stream = {"stream": True, "model": "tiny", "messages": [{"role": "user", "content": "word " * 300}]}
    with pytest.raises(openai.BadRequestError):
        trained.client().chat.completions.create(**stream)
    with pytest.raises(openai.BadRequestError):
        trained.client().completions.create(model="tiny", prompt="word " * 300)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: expected a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature is 2.1: expected a number from 0 to 2"),
        ({"temperature": "hot"}, 'temperature is "hot": expected a number from 0 to 2'),
        ({"temperature": True}, "temperature is true: expected a number from 0 to 2"),
        ({"top_p": 0}, "top_p is 0: expected a number above 0 to 1"),
        ({"min_p": 2}, "min_p is 2: expected a number from 0 to 1"),
        ({"top_k": 1.5}, "top_k is 1.5: expected a whole number from -1 to 2147483647"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: expected a number from 0.01 to 100"),
        ({"max_tokens": 0}, "max_tokens is 0: expected a whole number of at least 1, or -1 for no limit"),
        ({"max_tokens": -2}, "max_tokens is -2: expected a whole number of at least 1, or -1 for no limit"),
        ({"max_tokens": True}, "max_tokens is true: expected a whole number of at least 1, or -1 for no limit"),
        (
            {"max_tokens": 2, "max_completion_tokens": 3},
            "max_tokens is 2: expected the same as max_completion_tokens, 3, or only one of the two",
        ),
        ({"seed": 1 << 63}, f"seed is {1 << 63}: expected a whole number from {-(1 << 63)} to {(1 << 63) - 1}"),
        ({"stop": [""]}, 'stop is [""]: expected strings that are not empty'),
        ({"stop": 5}, "stop is 5: expected a list of at most 64 strings"),
        ({"stop": ["a"] * 65}, f"stop is {json.dumps(['a'] * 65)[:57]}...: expected a list of at most 64 strings"),
        ({"stop": [5]}, "stop[0] is 5: expected a string"),
        ({"stream": 1}, "stream is 1: expected true or false"),
        ({"stream_options": {}}, "stream_options is {}: expected an object, together with stream: true"),
        ({"n": 2}, "n is not supported but as 1"),
        ({"n": True}, "n is not supported but as 1"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported but as 0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported but as 0"),
        ({"logit_bias": {"1": 2}}, "logit_bias is not supported but as {}"),
        ({"logprobs": True}, "logprobs is not supported but as false"),
        ({"tools": [{}]}, "tools is not supported but as []"),
        (
            {"response_format": {"type": "json_object"}},
            'response_format is not supported but as {"type": "text"}',
        ),
        ({"temprature": 1}, "temprature is not supported"),
        ({"passages": "red"}, 'passages is "red": expected a list of at most 100 strings'),
        ({"messages": None}, "messages is null: expected a list of 1 to 1000 messages"),
        ({"messages": []}, "messages is []: expected a list of 1 to 1000 messages"),
        ({"messages": ["hello"]}, 'messages[0] is "hello": expected an object with role and content'),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            'messages[0].role is "robot": expected system, developer, user, assistant or tool',
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content is 5: expected a string or a list of text parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages[0].content[0] is {"type": "image_url"}: expected a text part, {"type": "text", "text": ...}',
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            'messages[0].content is "\\ud800": expected a string without lone surrogates',
        ),
        ({"messages": [{**HELLO[0], "audio": "Ann"}]}, "messages[0].audio is not supported"),
        (
            {"messages": [{"role": "assistant", "content": "first"}]},
            "the messages have no question to answer: expected a text of the role user",
        ),
        (
            {"messages": [{"role": "user", "content": " "}]},
            "the messages have no question to answer: expected a text of the role user",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [1]}, *HELLO]},
            'a tool call of message 2 is not understood: expected {"function": {"name": ..., "arguments": ...}}',
        ),
        ({"ignore_eos": True}, "ignore_eos is not supported but as false"),
        ({"min_tokens": 5}, "min_tokens is not supported but as 0"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_a_field_that_cannot_be_is_named(trained, fields, message):
    status, answer = trained.ask(CHAT, {"model": "tiny", "messages": HELLO, **fields})
    assert answer["error"]["message"] == message
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("prompt", [None, "", 5, [], ["a", "b"], [[1, 2]]])
def test_a_prompt_is_one_text(trained, prompt):
    status, answer = trained.ask("/v1/completions", {"prompt": prompt})
    assert status == 400
    assert answer["error"]["message"].endswith("expected a string that is not empty, or a list with one")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: Expecting value"),
        (b"{", "the body is not JSON: Expecting property name"),
        (b"\xff", "the body is not JSON: "),
        (b"[1]", "the body is [1]: expected a JSON object"),
        (b"[" * 100_000, "the body is not JSON: it is nested too deeply"),
        (b'{"temperature": NaN}', "the body is not JSON: NaN is not a JSON number"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "the body is not JSON: "),
    ],
    ids=range(7),
)
def test_a_body_that_is_no_json_object_is_refused(trained, body, message):
    status, answer = trained.ask(CHAT, body)
    assert status == 400
    assert answer["error"]["message"].startswith(message)
    assert answer["error"]["code"] == "invalid_json"
