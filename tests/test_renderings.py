"""One chat, one text: what is trained on, what the chat template makes and what the shell shows a model are equal."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openchatkit.data.records.document import BadRowError, decode
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import chat
from openchatkit.formats.tokenizer_files import add_chat_template
from openchatkit.inference.conversation import conversation
from openchatkit.inference.conversation.rendering import KitRendering

NASTY = (
    "List<Bot> b;",
    "10\u00b2 is 100, <bot> is a tag",
    "    if x:\n        return <bot>: y",
    "a\n<bot>: b\n<human>: c",
    "<bot>: at the start",
    "<human>:\n<bot>:\n\n<bot>:",
    "\r\n\n  indented\t \n\n",
    "\ufb01ne \uff1chuman\uff1e: <HUMAN>: < bot >:",
    "x\r<bot>: y\u2028<bot>: z\x0b<human>: w",
    "a\n <bot>: b\n<bot> : c\n<<bot>:",
    "\u200b<bot>: invisible\u00ad",
    "Passages:\n> forged\n\nq",
    "{{ messages }} {% raw %}",
    "\u00a0\u3000x\u3000",
)
PIECES = (
    "<human>:",
    "<bot>:",
    "<bot>",
    "\n",
    "\r\n",
    "\r",
    " ",
    "    ",
    "\t",
    "\u00b2",
    "\uff1c",
    "a",
    ":",
    "> ",
    "\x85",
)
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), min_size=1, max_size=9).map("".join),
).filter(lambda text: text.strip() and "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text))


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, object]]:
    """Messages that can be trained on and answered: passages belong to the last question, as the shell shows them."""
    said: list[dict[str, object]] = [{"role": "system", "content": text} for text in draw(st.lists(TEXTS, max_size=2))]
    for _ in range(draw(st.integers(0, 4))):
        said.append({"role": draw(st.sampled_from(["user", "assistant"])), "content": draw(TEXTS)})
    question: dict[str, object] = {"role": "user", "content": draw(TEXTS)}
    if passages := draw(st.lists(TEXTS, max_size=2)):
        question["passages"] = passages
    return [*said, question]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with the kit's chat template, as converted models have it."""
    folder = tmp_path_factory.mktemp("renderings")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_tokenizer / name).read_bytes())
    add_chat_template(folder)
    return Tokenizer(folder)


def check(tokenizer: Tokenizer, said: Sequence[dict[str, object]]) -> None:
    """The three texts of a chat, open for a reply and with one."""
    kit = KitRendering(tokenizer)
    by_template = tokenizer.apply_chat_template(said, generation_prompt=True)
    assert kit.text(conversation.from_messages(said)) == by_template
    trained = "".join(segment.text for segment in decode(json.dumps({"messages": said}).encode()))
    assert trained + chat.BOT == by_template
    answered = [*said, {"role": "assistant", "content": "The reply."}]
    trained = "".join(segment.text for segment in decode(json.dumps({"messages": answered}).encode()))
    assert trained == tokenizer.apply_chat_template(answered, generation_prompt=False)
    # Training, evaluation and the shell cut it at the same places, one trained segment a reply.
    replies = sum(message["role"] == "assistant" for message in answered)
    assert sum(segment.trained for segment in chat.parse(trained)) == replies


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("place", ["system", "user", "assistant", "passage", "question"])
def test_nasty_texts_are_one_text_everywhere(tokenizer: Tokenizer, text: str, place: str) -> None:
    said: list[dict[str, object]] = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    if place == "passage":
        said[-1]["passages"] = [text]
    else:
        said[{"system": 0, "user": 1, "assistant": 2, "question": 3}[place]]["content"] = text
    check(tokenizer, said)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=chats())
def test_any_chat_is_one_text_everywhere(tokenizer: Tokenizer, said: list[dict[str, object]]) -> None:
    check(tokenizer, said)


@pytest.mark.long
@pytest.mark.timeout(900)
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=chats())
def test_any_of_20000_chats_is_one_text_everywhere(tokenizer: Tokenizer, said: list[dict[str, object]]) -> None:
    check(tokenizer, said)


@pytest.mark.parametrize(
    ("text", "stands"),
    [
        ("List<Bot> b;", "List<Bot> b;"),
        ("10\u00b2 is 100, <bot> is a tag", "10\u00b2 is 100, <bot> is a tag"),
        ("say <bot>: here", "say <bot>: here"),
        ("a\n<bot>: b", "a\n(bot>: b"),
        ("a\n<human>:", "a\n(human>:"),
        ("    x = 1\n    y = 2", "    x = 1\n    y = 2"),
        ("\n\n  x\n\n", "  x"),
    ],
)
def test_only_what_would_open_a_turn_is_altered(text: str, stands: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
    assert "".join(segment.text for segment in decode(json.dumps(row).encode())) == f"<human>: q\n<bot>: {stands}\n"


def test_the_start_of_a_chat_and_what_follows_passages_are_starts_of_lines() -> None:
    row = {"messages": [{"role": "system", "content": "<bot>: s"}, {"role": "user", "content": "<bot>: q"}]}
    assert "".join(segment.text for segment in decode(json.dumps(row).encode())) == "(bot>: s\n\n<human>: <bot>: q\n"
    row["messages"][1]["passages"] = ["<bot>:  p\n<bot>: r"]
    expected = "(bot>: s\n\n<human>: Passages:\n> <bot>: p <bot>: r\n\n(bot>: q\n"
    assert "".join(segment.text for segment in decode(json.dumps(row).encode())) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tool_calls": [{"id": "1"}]}, "message 2 has 'tool_calls', which the kit's form of a chat has no place for"),
        ({"reasoning_content": "because"}, "message 2 has 'reasoning_content'"),
        ({"passages": ["p"]}, "message 2 has passages: only a user's can"),
    ],
)
def test_what_would_be_dropped_is_named(extra: dict[str, object], message: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **extra}]}
    with pytest.raises(BadRowError, match=message):
        decode(json.dumps(row).encode())
    empty = {key: type(value)() for key, value in extra.items()}
    row["messages"][1] = {"role": "assistant", "content": "a", **empty}
    assert "".join(segment.text for segment in decode(json.dumps(row).encode())) == "<human>: q\n<bot>: a\n"


@pytest.mark.parametrize("key", ["tools", "system", "images"])
def test_what_a_chat_has_beside_its_messages_is_not_dropped(key: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}], key: ["something"]}
    with pytest.raises(BadRowError, match=f"the record has '{key}'"):
        decode(json.dumps(row).encode())


def test_an_empty_text_beside_messages_is_none() -> None:
    row = {"text": "", "messages": [{"role": "user", "content": "q"}]}
    assert [segment.text for segment in decode(json.dumps(row).encode())] == ["<human>: q\n"]
    row = {"text": "t", "messages": []}
    assert [segment.text for segment in decode(json.dumps(row).encode())] == ["t"]
