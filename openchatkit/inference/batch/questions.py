"""A row of a batch: a question with what belongs to it, as one JSON object on a line.

    {"prompt": "...", "passages": ["..."], "system": "...", "max_tokens": 64, "id": "..."}
    {"messages": [{"role": "user", "content": "..."}, ...], "id": 7}

All but the question is optional. Other keys are refused, since a setting that is silently ignored would be noticed much
too late.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from openchatkit.errors import UserError
from openchatkit.inference.conversation import conversation
from openchatkit.inference.conversation.conversation import Conversation

SIZE_LIMIT = 16 << 20  # bytes, as of a training record
_KEYS = ("prompt", "messages", "passages", "system", "max_tokens", "id")


@dataclass(frozen=True)
class BatchRow:
    """A line of the input that is not empty: its number, from 1, and its bytes; those of one too long are cut."""

    number: int
    data: bytes


@dataclass(frozen=True)
class BatchQuestion:
    """The conversation that a row asks about. `max_tokens` None means as the flags say."""

    conversation: Conversation
    max_tokens: int | None


def read_row(file: BinaryIO, before: int) -> BatchRow | None:
    """Return the next row after line `before`, or None at the end."""
    number = before
    while line := file.readline(SIZE_LIMIT + 1):
        number += 1
        while len(line) > SIZE_LIMIT and (rest := file.readline(SIZE_LIMIT)) and not rest.endswith(b"\n"):
            pass
        data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if data.strip():
            return BatchRow(number, data.strip())
    return None


def decode(row: BatchRow) -> dict[str, object]:
    """Return a row's object. UserError says why it is not one."""
    if len(row.data) > SIZE_LIMIT:
        raise UserError(f"the row is too long: expected at most {SIZE_LIMIT} bytes")
    try:
        value = json.loads(row.data.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} of the row is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise UserError("the row holds half of a surrogate pair, which is not a character") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the row is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError("the row is not a JSON object: expected one with prompt or messages")
    return value


def parse_question(row: Mapping[str, object], *, system: str = "") -> BatchQuestion:
    """Return the question of a decoded row; `system` is the system text of rows without one. UserError if malformed."""
    if unknown := [key for key in row if key not in _KEYS]:
        raise UserError(f"unknown key {unknown[0][:40]!r}: expected {', '.join(_KEYS)}")
    if ("prompt" in row) == ("messages" in row):
        raise UserError("expected either prompt or messages")
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id", ""), str | int):
        raise UserError("id is neither a text nor a whole number")
    asked = _prompt(row["prompt"]) if "prompt" in row else _messages(row["messages"])
    passages = row.get("passages", [])
    if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
        raise UserError("passages is not a list of strings")
    if passages:
        last = asked.turns[-1]
        asked = asked.undone().asked(last.text, (*last.passages, *passages))
    if "system" in row:
        if asked.system:
            raise UserError("there is a system text twice: expected it in system or in messages")
        if not isinstance(row["system"], str):
            raise UserError("system is not text")
        asked = asked.with_system(row["system"])
    elif not asked.system:
        asked = asked.with_system(system)
    return BatchQuestion(asked, _max_tokens(row.get("max_tokens")))


def _prompt(prompt: object) -> Conversation:
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("prompt is not text, or is empty")
    return Conversation().asked(prompt)


def _messages(messages: object) -> Conversation:
    if not isinstance(messages, list):
        raise UserError("messages is not a list")
    return conversation.to_answer(messages)


def _max_tokens(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"max_tokens {str(value)[:40]}: expected a whole number of at least 1")
    return value
