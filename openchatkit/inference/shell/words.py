"""Words as they are typed: switches and settings read and written, and what was probably meant."""

import difflib
import json
from collections.abc import Iterable

from openchatkit.errors import UserError
from openchatkit.inference.streaming import clean

_ON_OFF = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that was probably meant, or ""."""
    return next(iter(difflib.get_close_matches(name.lower(), list(names), 1)), "")


def on_off(text: str, name: str) -> bool:
    """What was typed for the switch `name`. UserError for neither."""
    if text.lower() not in _ON_OFF:
        raise UserError(f"{name} {clean(text)[:40]!r}: expected on or off")
    return _ON_OFF[text.lower()]


def plain(value: object) -> str:
    """A setting's value as /set takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return "none" if value is None else str(value)


def short(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
