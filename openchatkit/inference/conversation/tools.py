"""Calls of tools and their results as text, for models that read questions and replies alone.

A call is part of the assistant's reply, and its result part of what the human's side says next:

    <bot>: Calling get_weather({"city": "Paris"})
    <human>: Result of get_weather:
    18 degrees
"""

import json
from collections.abc import Iterable, Iterator, Mapping

from openchatkit.errors import UserError

RESULTS = ("tool", "function")  # the roles of messages with results
_UNNAMED = "a tool"


def with_calls(message: Mapping[str, object], content: str, number: int) -> str:
    """Return what an assistant's message says and calls. UserError, naming the message, for a call that is none."""
    called = "\n".join(f"Calling {name}({arguments})" for _, name, arguments in _calls(message, number))
    return f"{content}\n\n{called}" if called and content.strip() else called or content


def with_name(message: Mapping[str, object], content: str, before: Iterable[Mapping[str, object]]) -> str:
    """Return a tool's result under the tool's name, which its message says, or the call `before` it that it is of."""
    name, id = message.get("name"), message.get("tool_call_id")
    if not isinstance(name, str) and isinstance(id, str):
        calls = (call for earlier in before for call in _calls(earlier, 0))
        name = next((called for call_id, called, _ in calls if call_id == id), None)
    return f"Result of {name if isinstance(name, str) else _UNNAMED}:\n{content}"


def calls_something(message: Mapping[str, object]) -> bool:
    """Return whether a message has calls, well-formed or not."""
    return bool(message.get("tool_calls") or message.get("function_call"))


def _calls(message: Mapping[str, object], number: int) -> Iterator[tuple[object, str, str]]:
    """Yield the calls of a message: (id, name, arguments)."""
    calls = message.get("tool_calls") or []
    if function := message.get("function_call"):
        calls = [{"function": function}]
    if not isinstance(calls, list):
        raise UserError(f"the tool_calls of message {number} are no list")
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
