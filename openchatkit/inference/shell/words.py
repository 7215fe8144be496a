"""Words as they are typed: switches and settings read and written, and what was probably meant."""

import difflib
import json
from collections.abc import Iterable

from openchatkit.errors import UserError
from openchatkit.inference.streaming import clean
from openchatkit.texts import parse_bool


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that was probably meant, or ""."""
    return next(iter(difflib.get_close_matches(name.lower(), list(names), 1)), "")


def on_off(text: str, name: str) -> bool:
    """What was typed for the switch `name`. UserError for neither."""
    value = parse_bool(text)
    if value is None:
        raise UserError(f"{name} {clean(text)[:40]!r}: expected on or off")
    return value


def plain(value: object) -> str:
    """A setting's value as /set takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return "none" if value is None else str(value)
