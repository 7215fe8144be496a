"""One record -> the segments of its document, or the reason why it cannot be used.

Three forms. {"text": "<human>: ...\n<bot>: ..."}. {"messages": [{"role": ..., "content": ...}]} with the roles system
(before all others), user and assistant; a user's message may have "passages", a list of strings; an assistant's with
"weight": 0 (or "train": false) is context, not trained on, and nothing that a message spells can open a turn. And text
with a label, to train a moderation model on (`formats.moderation`): {"context": "...", "safety_label": "__casual__"},
or "text" for "context", as prosocial-dialog has them, or {"text": "Input: ...\nOutput: casual"}, as OIG-moderation has
them.

Keys that carry what a model should read or train on and that have no place in such a chat, tool calls and images for
example, make a row unusable. Other keys are ignored.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from openchatkit.data.records.reader import Records
from openchatkit.data.records.tables import CARRIERS
from openchatkit.errors import UserError
from openchatkit.formats import chat, moderation

_ROLES = {"user": "human", "assistant": "bot"}
# Keys that other kits and services have in a message beside its content.
_MESSAGE_CARRIERS = (
    *("tool_calls", "tool_call_id", "function_call", "refusal", "reasoning", "reasoning_content", "thinking", "parts"),
    *("images", "image", "image_url", "audio", "video", "videos", "files", "file", "attachments", "documents"),
)


class BadRowError(ValueError):
    """A row that cannot be used; the message is the reason, without file and line."""


def decode(data: bytes) -> list[chat.Segment]:
    """Return the segments of one record, given as JSON; BadRowError where it cannot be used."""
    return segments(read_object(data))


def segments(record: dict[str, object]) -> list[chat.Segment]:
    """Return the segments of one record; BadRowError where it cannot be used."""
    text, messages = record.get("text"), record.get("messages")
    if _holds_something(text) and _holds_something(messages):
        raise BadRowError("the record has both 'text' and 'messages': which of them is meant?")
    if messages is not None and not _holds_something(text):
        _refuse(record, CARRIERS, "the record")
        return _parse_chat(messages)
    if record.get("safety_label") is not None:
        return _parse_labelled(record)
    if "text" in record:
        return _parse_text(usable_string(text, "'text'"))
    if "messages" in record:
        raise BadRowError("expected 'messages' to be a list, found null")
    found = ", ".join(repr(key) for key in list(record)[:5]) or "none"
    raise BadRowError(f"the record has no 'text' and no 'messages' (its keys: {found})")


def texts(path: Path) -> Iterator[str]:
    """Yield the documents of a file as text, in order; UserError at the first row that cannot be used."""
    with Records(path) as records:
        for row in records.rows():
            try:
                if row.error:
                    raise BadRowError(row.error)
                document = decode(row.data)
            except BadRowError as error:
                raise UserError(f"{path}:{row.number}: {error}: mend or remove it") from error
            yield "".join(segment.text for segment in document)


def read_object(data: bytes) -> dict[str, object]:
    """Return the JSON object of a row, with any keys; BadRowError where it is not one."""
    try:
        record = json.loads(data.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRowError(f"byte {error.start + 1} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"not JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"no record: {error}") from error
    if not isinstance(record, dict):
        raise BadRowError(f'expected an object such as {{"text": "..."}}, found {_kind(record)}')
    return record


def _parse_text(text: str) -> list[chat.Segment]:
    try:
        exchanges = moderation.parse(text)
    except ValueError as error:
        raise BadRowError(f"'text': {error}") from error
    return chat.parse(text) if exchanges is None else moderation.record(exchanges)


def _parse_labelled(record: dict[str, object]) -> list[chat.Segment]:
    keys = [key for key in ("context", "text") if record.get(key) is not None]
    if len(keys) != 1:
        found = "both" if keys else "neither"
        raise BadRowError(f"expected 'context' or 'text' beside 'safety_label', found {found}")
    text, label = usable_string(record[keys[0]], f"'{keys[0]}'"), record["safety_label"]
    known = moderation.label_of(label) if isinstance(label, str) else None
    if known is None:
        shown = repr(label)[:50] if isinstance(label, str) else _kind(label)
        raise BadRowError(f"the 'safety_label' is {shown}: expected one of {', '.join(moderation.LABELS)}")
    if any(segment.trained for segment in chat.parse(text)):
        raise BadRowError(f"'{keys[0]}' is a chat with replies, and has a 'safety_label': which is to be trained on?")
    return moderation.record([(text, known)])


def _holds_something(value: object) -> bool:
    """Return whether a value holds anything: tables have empty ones in every row without such a key."""
    return value is not None and value is not False and value not in ("", [], {})


def _refuse(mapping: dict[str, object], keys: Collection[str], what: str) -> None:
    """Raise BadRowError where `mapping` has something under one of `keys`, which would be lost."""
    for key, value in mapping.items():
        if key in keys and _holds_something(value):
            raise BadRowError(f"{what} has '{key}', which the kit's form of a chat has no place for")


def _parse_chat(messages: object) -> list[chat.Segment]:
    if not isinstance(messages, list):
        raise BadRowError(f"expected 'messages' to be a list, found {_kind(messages)}")
    system: list[str] = []
    turns: list[chat.Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRowError(f"expected message {number} to be an object, found {_kind(message)}")
        role, content = message.get("role"), message.get("content")
        _refuse(message, _MESSAGE_CARRIERS, f"message {number}")
        passages = _passages(message.get("passages"), role, number)
        if role == "system":
            if turns:
                raise BadRowError(f"message {number} is the system's: expected it before all others")
            # In many data sets an empty one means that there is none.
            empty = isinstance(content, str) and not content.strip()
            system += [] if empty else [usable_string(content, f"the content of message {number}")]
        elif isinstance(role, str) and role in _ROLES:
            text = usable_string(content, f"the content of message {number}")
            turns.append(chat.Turn(_ROLES[role], text, passages, trained=_trained(message, number)))
        else:
            shown = repr(role)[:50] if isinstance(role, str) else _kind(role)
            raise BadRowError(f"message {number} has the role {shown}: expected system, user or assistant")
    if not turns:
        raise BadRowError("'messages' holds no message of a user or an assistant")
    return chat.render(turns, system=chat.join_system(system), prompt=False)


def _passages(passages: object, role: object, number: int) -> tuple[str, ...]:
    """Return the retrieved texts of a user's message; a chat shows the model those of its last question."""
    if not _holds_something(passages):
        return ()
    if role != "user":
        raise BadRowError(f"message {number} has passages: only a user's can")
    if not isinstance(passages, list):
        raise BadRowError(f"expected the passages of message {number} to be a list, found {_kind(passages)}")
    return tuple(usable_string(passage, f"a passage of message {number}") for passage in passages)


def _trained(message: dict[str, object], number: int) -> bool:
    """Return whether a message counts in the loss on responses: OpenAI's `weight`, or `train` in other kits."""
    weight = message.get("weight", message.get("train"))
    if weight is None:
        return True
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise BadRowError(f"message {number} has the weight {str(weight)[:20]}: expected 0 or 1")
    return weight == 1


def usable_string(value: object, what: str) -> str:
    """Return `value` if it is a string that a document may be made of; else raise BadRowError about `what`."""
    if not isinstance(value, str):
        raise BadRowError(f"expected {what} to be a string, found {_kind(value)}")
    if not value.strip():
        raise BadRowError(f"{what} is empty")
    if "\0" in value:
        raise BadRowError(f"{what} holds a NUL character, a mark of damaged data")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{what} holds half a surrogate pair") from error
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
