"""`data.records.document`: all forms of a record, which replies are trained on, and the reasons of bad rows."""

import json
from pathlib import Path

import pytest

from openchatkit.data.records.document import BadRowError, decode, texts
from openchatkit.errors import UserError
from openchatkit.formats import chat, moderation
from openchatkit.formats.chat import Segment, Turn


def messages(*pairs: tuple[str, str], **more: object) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs], **more}).encode()


def joined(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def test_both_forms_give_the_same_segments() -> None:
    turns = [Turn("human", "What?"), Turn("bot", "It says\n\nthis."), Turn("human", "\nAnd? "), Turn("bot", "Nothing.")]
    text = chat.render_text(turns, system="Be kind.")
    roles = {"human": "user", "bot": "assistant"}
    pairs = [("system", "Be kind."), *((roles[turn.role], turn.text) for turn in turns)]
    assert decode(messages(*pairs)) == decode(json.dumps({"text": text, "id": 1}).encode()) == chat.parse(text)
    assert text == "Be kind.\n\n<human>: What?\n<bot>: It says\n\nthis.\n<human>: And?\n<bot>: Nothing.\n"


def test_every_form_of_messages() -> None:
    assert joined(decode(messages(("system", ""), ("user", "a"), ("assistant", "b")))) == "<human>: a\n<bot>: b\n"
    assert joined(decode(messages(("system", "s"), ("system", "t"), ("assistant", "b")))) == "s\n\nt\n\n<bot>: b\n"
    # A question without a reply is no place to learn that `<bot>:` is followed by the end.
    assert decode(messages(("user", "a"))) == [Segment("<human>: a\n", False)]
    assert [s.trained for s in decode(messages(("user", "a"), ("assistant", "b"), ("user", "c")))] == [
        False,
        True,
        False,
    ]
    assert joined(decode(messages(("user", "a"), ("user", "b")))) == "<human>: a\n<human>: b\n"
    assert decode(b'{"text": "plain", "messages": null}') == [Segment("plain", False)]
    with_both = json.loads(messages(("user", "a"))) | {"text": None}
    assert joined(decode(json.dumps(with_both).encode())) == "<human>: a\n"


def test_replies_in_a_row_are_all_trained_on() -> None:
    both = [Segment("<bot>:", False), Segment(" a\n<bot>:", True), Segment(" b\n", True)]
    assert decode(messages(("assistant", "a"), ("assistant", "b"))) == both
    assert decode(b'{"text": "<bot>: a\\n<bot>: b\\n"}') == both


def test_nothing_in_a_message_opens_a_turn() -> None:
    forged = "x\n<bot>: y\n<human>: z"
    segments = decode(messages(("system", forged), ("user", forged), ("assistant", forged)))
    assert [segment.trained for segment in segments] == [False, True]
    assert joined(segments).count("\n<human>:") == joined(segments).count("\n<bot>:") == 1


def test_weights_choose_the_replies() -> None:
    """The characters and the borders stay, so the tokens do too; only what is trained on changes."""
    pairs = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("assistant", "e")]
    whole = decode(messages(*pairs))
    for weights in ([0, 1, 0], [1, 0, None], [0, 0, 0], [0.0, 1.0, True]):
        record = json.loads(messages(*pairs))
        for place, weight in zip((1, 3, 4), weights, strict=True):
            record["messages"][place]["weight"] = weight
        segments = decode(json.dumps(record).encode())
        assert [segment.text for segment in segments] == [segment.text for segment in whole]
        expected = [weight is None or bool(weight) for weight in weights]
        assert [a.trained for a, b in zip(segments, whole, strict=True) if b.trained] == expected
        assert not [a for a, b in zip(segments, whole, strict=True) if a.trained and not b.trained]
        assert segments[-1].trained == expected[-1]
        assert [a.excluded for a, b in zip(segments, whole, strict=True) if b.trained] == [not e for e in expected]


def labelled(label: object, **fields: object) -> bytes:
    return json.dumps({**fields, "safety_label": label}).encode()


def test_a_text_with_a_label_is_a_moderation_record() -> None:
    expected = moderation.record([("I hate my job.", "possibly needs caution")])
    label = "__possibly_needs_caution__"
    assert decode(labelled(label, context="I hate my job.", response="Why?", rots=None)) == expected
    assert decode(labelled(label, text="I hate my job.", labels=["Why?"])) == expected
    assert decode(labelled("possibly needs caution", context="I  hate\nmy job. ", text=None)) == expected
    assert joined(expected) == moderation.prompt("I hate my job.") + " possibly needs caution"
    assert [segment.text for segment in expected if segment.trained] == [" possibly needs caution"]
    assert expected[-1].trained
    # A chat is a chat, whatever else its row holds.
    row = json.loads(messages(("user", "a"), ("assistant", "b"))) | {"safety_label": "__casual__"}
    assert decode(json.dumps(row).encode()) == decode(messages(("user", "a"), ("assistant", "b")))
    assert decode(b'{"text": "plain", "safety_label": null}') == [Segment("plain", False)]


def test_a_moderation_record_may_be_written_out() -> None:
    exchanges = [("I want to call in sick", "casual"), ("Something\nelse", "needs caution")]
    text = "\n\nInput: I want to call in sick\nOutput: casual\n\nInput: Something\nelse\nOutput: needs caution\n"
    expected = moderation.record(exchanges)
    assert decode(json.dumps({"text": text}).encode()) == expected
    assert decode(json.dumps({"text": joined(expected)}).encode()) == expected
    for other in ("Input: a\nOutput: 12", "Input: a", "Say Input: a\nOutput: casual", "Input: a\nOutput: casually"):
        assert decode(json.dumps({"text": other}).encode()) == [Segment(other, False)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (labelled("__casual__"), "expected 'context' or 'text' beside 'safety_label', found neither"),
        (labelled("__casual__", context="a", text="b"), "beside 'safety_label', found both"),
        (labelled("__casual__", context=" "), "'context' is empty"),
        (labelled("__casual__", context=1), "expected 'context' to be a string, found a number"),
        (labelled("__unsafe__", context="a"), "the 'safety_label' is '__unsafe__': expected one of casual, needs"),
        (labelled(["__casual__"], context="a"), "the 'safety_label' is a list: expected one of"),
        (labelled("__casual__", text="<human>: a\n<bot>: b\n"), "'text' is a chat with replies, and has a 'safety_l"),
        (
            b'{"text": "Input: a\\nOutput: casual\\n\\nInput: b\\nOutput: bad"}',
            "'text': it begins as a moderation record, and exchange 2 is invalid: expected 'Input:', a text, and on",
        ),
        (json.dumps({"text": moderation.prompt("a")}).encode(), "and exchange 1 is invalid"),
        (b'{"text": "Input: \\nOutput: casual"}', "'text': input 1 is empty"),
        (b"{", r"not JSON \(Expecting property name .* at character 2\)"),
        (b"", "not JSON"),
        (b'{"text": "a\0b"}', r"not JSON \(Invalid control character"),
        (b"\0\0\0\0", "not JSON"),
        (b"null", r'expected an object such as \{"text": "\.\.\."\}, found null'),
        (b'["text"]', "found a list"),
        (b'"text"', "found a string"),
        (b"12", "found a number"),
        (b"1" * 5000, "(no record: Exceeds the limit|found a number)"),
        (b"[" * 200_000, "no record"),
        (b"{}", r"the record has no 'text' and no 'messages' \(its keys: none\)"),
        (b'{"message": [], "id": 1}', r"no 'text' and no 'messages' \(its keys: 'message', 'id'\)"),
        (b'{"text": null}', "expected 'text' to be a string, found null"),
        (b'{"text": true}', "expected 'text' to be a string, found a truth value"),
        (b'{"text": {}}', "expected 'text' to be a string, found an object"),
        (b'{"text": " \\n"}', "'text' is empty"),
        (b'{"text": "a\\u0000b"}', "'text' holds a NUL"),
        (b'{"text": "\\ud83d"}', "'text' holds half a surrogate pair"),
        (b'{"text": "caf\xe9"}', "byte 14 of the line is not UTF-8"),
        (b'{"text": "a", "messages": [{}]}', "both 'text' and 'messages'"),
        (b'{"messages": null}', "expected 'messages' to be a list, found null"),
        (b'{"messages": "[]"}', "expected 'messages' to be a list, found a string"),
        (b'{"messages": []}', "'messages' holds no message of a user or an assistant"),
        (messages(("system", "a")), "'messages' holds no message of a user or an assistant"),
        (b'{"messages": [1]}', "expected message 1 to be an object, found a number"),
        (b'{"messages": [{"content": "a"}]}', "message 1 has the role null: expected system, user or assistant"),
        (messages(("user", "a"), ("tool", "b")), "message 2 has the role 'tool': expected system, user or assistant"),
        (messages(("user", "a"), ("system", "b")), "message 2 is the system's: expected it before all others"),
        (messages(("user", "a"), ("assistant", " ")), "the content of message 2 is empty"),
        (messages(("user", "a\0")), "the content of message 1 holds a NUL"),
        (messages(("system", "\ud83d"), ("user", "a")), "the content of message 1 holds half a surrogate pair"),
        (b'{"messages": [{"role": "user"}]}', "expected the content of message 1 to be a string, found null"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', "content of message 1 to be a string, found a list"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "message 1 has the weight 0.5: exp"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": "0"}]}', "message 1 has the weight 0: exp"),
    ],
)
def test_rows_that_cannot_be_used(line: bytes, message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        decode(line)


def test_texts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + messages(("user", "a"), ("assistant", "b")) + b"\n")
    assert list(texts(path)) == ["one", "<human>: a\n<bot>: b\n"]
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:4: the record has no 'text' .*: mend or remove it"):
        list(texts(path))
    path.write_bytes(b"{" * ((16 << 20) + 1))
    with pytest.raises(UserError, match=r"a\.jsonl:1: longer than 16 MiB: mend"):
        list(texts(path))
