"""The conversation so far.

Owns how turns follow each other, and how they are converted to messages and back; how they are written for a model is
`rendering`'s. A conversation is a value: asking and answering make a new one, so a turn that fails is undone by keeping
the old.

Calls of tools and their results become text, for models that read only questions and replies. A call is part of the
assistant's reply, its result part of the human's next turn:

    <bot>: Calling get_weather({"city": "Paris"})
    <human>: Result of get_weather:
    18 degrees
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn

_ROLES = {"user": "human", "assistant": "bot"}
_SYSTEM = ("system", "developer")
TOOL_ROLES = ("tool", "function")


@dataclass(frozen=True)
class Conversation:
    """Turns of the human and the bot, mostly in alternation, under a system text.

    `preamble` (date and time) stands before the system text where a model was trained with one. A question keeps its
    passages, so that it can be asked again; `as_read` says which of them a model still reads. `begun` is the beginning
    of the reply to the last question, where the model is to continue one.
    """

    system: str = ""
    turns: tuple[Turn, ...] = ()
    preamble: str = ""
    begun: str = ""

    @property
    def last_question(self) -> Turn | None:
        """The human's last turn, answered or not."""
        return next((turn for turn in reversed(self.turns) if turn.role == "human"), None)

    @property
    def open(self) -> bool:
        """Whether the last turn is a question, which a reply can follow."""
        return bool(self.turns) and self.turns[-1].role == "human"

    def asked(self, text: str, passages: Sequence[str] = ()) -> "Conversation":
        """This conversation with a question, open for the bot's reply; it is added to one that has no reply yet."""
        turns = list(self.turns)
        _add(turns, Turn("human", text, tuple(passages)))
        return replace(self, turns=tuple(turns))

    def with_passages(self, passages: Sequence[str]) -> "Conversation":
        """This conversation with these passages of its last question, which is open."""
        assert self.open, self.turns[-1:]
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], passages=tuple(passages))))

    def answered(self, text: str) -> "Conversation":
        """This conversation with the reply to its last question."""
        assert self.open, self.turns[-1:]
        return replace(self, turns=(*self.turns, Turn("bot", self.begun + text)), begun="")

    def undone(self) -> "Conversation":
        """This conversation without its last question and what followed it; itself where there is none."""
        last = max((place for place, turn in enumerate(self.turns) if turn.role == "human"), default=len(self.turns))
        return replace(self, turns=self.turns[:last])

    def with_system(self, text: str) -> "Conversation":
        """This conversation under another system text; the preamble and the turns stay."""
        return replace(self, system=text)

    def exchanges(self) -> list[tuple[Turn, ...]]:
        """The turns in pairs, each a question and its reply; a reply that opens the conversation stands alone."""
        starts = [place for place, turn in enumerate(self.turns) if turn.role == "human" or place == 0]
        return [self.turns[start:end] for start, end in itertools.pairwise([*starts, len(self.turns)])]

    def without_oldest(self, count: int) -> "Conversation":
        """This conversation without its first `count` pairs of turns."""
        return replace(self, turns=tuple(turn for pair in self.exchanges()[count:] for turn in pair))

    def as_read(self) -> "Conversation":
        """This conversation as a model reads it: passages do their work for the reply to their question, and go."""
        if not any(turn.passages for turn in self.turns):
            return self
        answered = max((place for place, turn in enumerate(self.turns) if turn.role == "bot"), default=-1)
        before = [replace(turn, passages=()) for turn in self.turns[: answered + 1]]
        return replace(self, turns=(*before, *self.turns[answered + 1 :]))

    def alternating(self) -> "Conversation":
        """This conversation with consecutive turns of one side joined, an empty line between them."""
        turns: list[Turn] = []
        for turn in self.turns:
            _add(turns, turn)
        return replace(self, turns=tuple(turns))

    def messages(self) -> list[dict[str, object]]:
        """The system text and the turns as messages of the roles system, user and assistant; without the preamble."""
        messages: list[dict[str, object]] = []
        if self.system.strip():
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            message: dict[str, object] = {"role": "user" if turn.role == "human" else "assistant", "content": turn.text}
            if turn.passages:
                message["passages"] = list(turn.passages)
            messages.append(message)
        return messages


def begin(*, date: bool = True) -> Conversation:
    """An empty conversation; `date` opens it with the present date and time, as the original kit did."""
    return Conversation(preamble=chat.preamble(datetime.now().astimezone()) if date else "")


def from_messages(messages: Sequence[object], *, preamble: str = "") -> Conversation:
    """The conversation of messages {"role": ..., "content": ...}; a user's may have `passages`, a list of strings.

    Roles are system (or developer), user and assistant, in any order, and tool (or function), whose results are part of
    the user's side. System messages are joined, wherever they stand; consecutive messages of one side are separate
    turns, as in training. Calls of tools become text, other keys are ignored.
    UserError names the message that cannot be used.
    """
    system: list[str] = []
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is not an object: expected one with a role and a content")
        role, content = message.get("role"), message.get("content")
        if content is None and role == "assistant" and has_calls(message):
            content = ""
        if not isinstance(content, str):
            raise UserError(f"the content of message {number} is not text: expected a string")
        if role in _SYSTEM:
            system += [content] if content.strip() else []
        elif role in TOOL_ROLES:
            _add(turns, Turn("human", _with_name(message, content, messages[: number - 1])))
        elif isinstance(role, str) and role in _ROLES:
            content = _with_calls(message, content, number) if role == "assistant" else content
            turns.append(Turn(_ROLES[role], content, _passages(message.get("passages"), role, number)))
        else:
            raise UserError(
                f"message {number} has the role {str(role)[:40]!r}: expected system, user, assistant or tool"
            )
    return Conversation(chat.join_system(system), tuple(turns), preamble)


def to_answer(messages: Sequence[object]) -> Conversation:
    """The conversation of messages that ask for a reply; see `from_messages`.

    The last is a question, or a tool's result; or the assistant's, and then the reply finishes it. UserError where it
    is neither, or empty.
    """
    end = len(messages)
    while end and isinstance(last := messages[end - 1], Mapping) and last.get("role") == "assistant":
        end -= 1
    asked = from_messages(messages[:end])
    if not asked.open or not asked.turns[-1].text.strip():
        raise UserError("the messages have no question to answer: expected a text of the role user")
    begun = from_messages(messages[end:]).alternating()
    return replace(asked, begun=begun.turns[-1].text if begun.turns else "")


def _add(turns: list[Turn], turn: Turn) -> None:
    if turns and turns[-1].role == turn.role:
        before = turns.pop()
        turn = Turn(turn.role, f"{before.text}\n\n{turn.text}", (*before.passages, *turn.passages))
    turns.append(turn)


def _passages(passages: object, role: str, number: int) -> tuple[str, ...]:
    if passages is None:
        return ()
    if role != "user":
        raise UserError(f"message {number} of the {role} has passages: only a user's can")
    if not isinstance(passages, list | tuple) or not all(isinstance(passage, str) for passage in passages):
        raise UserError(f"the passages of message {number} are not a list of strings")
    return tuple(passages)


def _with_calls(message: Mapping[str, object], content: str, number: int) -> str:
    """The text and the calls of an assistant's message. UserError, naming the message, for a malformed call."""
    called = "\n".join(f"Calling {name}({arguments})" for _, name, arguments in _calls(message, number))
    return f"{content}\n\n{called}" if called and content.strip() else called or content


def _with_name(message: Mapping[str, object], content: str, before: Sequence[object]) -> str:
    """A tool's result under the tool's name, from its message or from the call among the messages `before` it."""
    name, id = message.get("name"), message.get("tool_call_id")
    if not isinstance(name, str) and isinstance(id, str):
        calls = (call for earlier in before if isinstance(earlier, Mapping) for call in _calls(earlier, 0))
        name = next((called for call_id, called, _ in calls if call_id == id), None)
    return f"Result of {name if isinstance(name, str) else 'a tool'}:\n{content}"


def has_calls(message: Mapping[str, object]) -> bool:
    """Whether a message has calls, well-formed or not."""
    return bool(message.get("tool_calls") or message.get("function_call"))


def _calls(message: Mapping[str, object], number: int) -> Iterator[tuple[object, str, str]]:
    """Yield the calls of a message: (id, name, arguments)."""
    calls = message.get("tool_calls") or []
    if function := message.get("function_call"):
        calls = [{"function": function}]
    if not isinstance(calls, list):
        raise UserError(f"the tool_calls of message {number} are not a list")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not name or not isinstance(arguments, str | Mapping | None):
            raise UserError(
                f'a tool call of message {number} is not understood: expected {{"function": {{"name": ..., '
                '"arguments": ...}}'
            )
        yield call.get("id"), name, arguments if isinstance(arguments, str) else _as_json(arguments or {}, number)


def _as_json(arguments: object, number: int) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except RecursionError as error:
        raise UserError(f"the arguments of a tool call of message {number} are nested too deeply") from error
