"""The fields of a request's JSON, taken one by one and checked as they are taken."""

import json
from collections.abc import Mapping, Sequence

from openchatkit.inference.server.errors import ApiError


def parse(data: bytes) -> dict[str, object]:
    """A request's body as a JSON object; ApiError 400 for anything else."""
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {shown(body)}: expected a JSON object", code="invalid_json")
    return body


def wrong(name: str, value: object, expected: str) -> ApiError:
    """The error for a field that is not as expected."""
    return ApiError(400, f"{name} is {shown(value)}: expected {expected}", param=name, code="invalid_value")


def shown(value: object) -> str:
    """A value as JSON, cut to a length that fits into a message."""
    try:
        text = json.dumps(value)
    except RecursionError:  # it was read with less of the stack in use
        text = "nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def text(name: str, value: object) -> str:
    """`value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise wrong(name, value, "a string without lone surrogates") from error
    return value


def texts(name: str, value: object, *, most: int) -> tuple[str, ...]:
    """`value` if it is a list of at most `most` strings, none of them blank."""
    if not isinstance(value, list) or len(value) > most:
        raise wrong(name, value, f"a list of at most {most} strings")
    if "" in value:
        raise wrong(name, value, "strings that are not empty")
    return tuple(text(f"{name}[{number}]", entry) for number, entry in enumerate(value))


class Fields:
    """A JSON object's fields; null counts as not given. `name` opens the names of fields within it, as "messages[0].".

    Each method takes a field out and raises ApiError 400, naming it, when it is not what is expected.
    """

    def __init__(self, body: Mapping[str, object], name: str = "") -> None:
        self._left = {key: value for key, value in body.items() if value is not None}
        self._name = name

    def take(self, name: str) -> object | None:
        """A field's value as it stands; None if it is not given."""
        return self._left.pop(name, None)

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number from `low` (or `above` it) to `high`."""
        value = self.take(name)
        if value is None:
            return None
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not low <= value <= high or (above and value == low):
            bounds = f"above {low:g}" if above else f"from {low:g}"
            raise wrong(self._name + name, value, f"a number {bounds} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise wrong(self._name + name, value, f"a whole number from {low} to {high}")
        return value

    def truth(self, name: str) -> bool:
        """True or false; false if it is not given."""
        value = self.take(name)
        if value not in (None, True, False) or isinstance(value, int | float) != isinstance(value, bool):
            raise wrong(self._name + name, value, "true or false")
        return bool(value)

    def refuse(self, defaults: Mapping[str, Sequence[object]], ignored: Sequence[str] = ()) -> list[str]:
        """ApiError 400 for any field that is left, unless it has one of its `defaults` or is `ignored`: those it names.

        An empty object or list asks for nothing and is not named.
        """
        passed_over = []
        for name, value in self._left.items():
            allowed = defaults.get(name, ())
            if name in ignored:
                passed_over += [name] if value not in ({}, []) else []
                continue
            if any(_same(value, default) for default in allowed):
                continue
            known = f"is not supported but as {' or '.join(map(shown, allowed))}" if allowed else "is not supported"
            param = self._name + name[:60]  # whatever a client makes up is shown no longer than that
            raise ApiError(400, f"{param} {known}", param=param, code="unsupported_parameter")
        return passed_over


def _same(value: object, default: object) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
