"""Fields of a request's JSON, taken one by one and checked as they are taken."""

import json
import math
from collections.abc import Mapping, Sequence

from openchatkit.inference.server.responses import ApiError
from openchatkit.texts import shorten


def parse_json(data: bytes) -> dict[str, object]:
    """Read a request's body as a JSON object; ApiError 400 for anything else."""
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {preview(body)}: expected a JSON object", code="invalid_json")
    return body


def invalid(name: str, value: object, expected: str) -> ApiError:
    """Return the error for a field that is not as expected."""
    return ApiError(400, f"{name} is {preview(value)}: expected {expected}", param=name, code="invalid_value")


def preview(value: object) -> str:
    """Return a value as JSON, cut to a length that fits into a message."""
    try:
        text = json.dumps(value)
    except RecursionError:  # the parser had more of the stack left
        text = "nested too deeply"
    return shorten(text)


def check_text(name: str, value: object) -> str:
    """Return `value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise invalid(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(name, value, "a string without lone surrogates") from error
    return value


def check_texts(name: str, value: object, *, most: int) -> tuple[str, ...]:
    """Return `value` if it is a list of at most `most` strings, none of them empty."""
    if not isinstance(value, list) or len(value) > most:
        raise invalid(name, value, f"a list of at most {most} strings")
    if "" in value:
        raise invalid(name, value, "strings that are not empty")
    return tuple(check_text(f"{name}[{number}]", entry) for number, entry in enumerate(value))


class Fields:
    """Fields of a JSON object; null counts as not given. `prefix` comes before their names in messages: "messages[0].".

    Each method takes a field out. ApiError 400, naming the field, when it is not what is expected.
    """

    def __init__(self, body: Mapping[str, object], prefix: str = "") -> None:
        self._left = {key: value for key, value in body.items() if value is not None}
        self._prefix = prefix

    def take(self, name: str) -> object | None:
        """Take any value; None if it is not given."""
        return self._left.pop(name, None)

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """Take a number from `low` (or `above` it) to `high`; None if it is not given."""
        value = self.take(name)
        if value is None:
            return None
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not low <= number <= high or (above and number == low):
            bounds = f"above {low:g}" if above else f"from {low:g}"
            raise invalid(self._prefix + name, value, f"a number {bounds} to {high:g}")
        return float(number)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Take a whole number from `low` to `high`; None if it is not given."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise invalid(self._prefix + name, value, f"a whole number from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        """Take true or false; false if it is not given."""
        value = self.take(name)
        if value not in (None, True, False) or isinstance(value, int | float) != isinstance(value, bool):
            raise invalid(self._prefix + name, value, "true or false")
        return bool(value)

    def reject_rest(self, defaults: Mapping[str, Sequence[object]], ignored: Sequence[str] = ()) -> list[str]:
        """Raise ApiError 400 for any field that is left, unless it has one of its `defaults` or is `ignored`.

        Returns the names of ignored fields; an empty object or list asks for nothing and is not named.
        """
        named = []
        for name, value in self._left.items():
            allowed = defaults.get(name, ())
            if name in ignored:
                named += [name] if value not in ({}, []) else []
                continue
            if any(_same(value, default) for default in allowed):
                continue
            known = f"is not supported but as {' or '.join(map(preview, allowed))}" if allowed else "is not supported"
            param = self._prefix + name[:60]  # a client may send a name of any length
            raise ApiError(400, f"{param} {known}", param=param, code="unsupported_parameter")
        return named


def _same(value: object, default: object) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
