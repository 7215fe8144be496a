"""The table of GPT-NeoX's settings: what becomes of each key of its configuration files, of 2021's and today's.

A key is used (`use`); without effect here, because it only concerns how GPT-NeoX computes (`ignore`); followed
differently, where a run is the same model on the same data all the same (`differ`); or refused, where it would be
another model or another training (`refuse`). `why` says the reason in each case. `key_tables` holds the rows.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from openchatkit.errors import UserError
from openchatkit.neox import key_tables
from openchatkit.neox.key_tables import Key, Outcome

KEYS: Mapping[str, Key] = {
    name: key
    for table in (
        # First, so that another architecture is named before the choices that come with it.
        key_tables.REFUSED,
        key_tables.MODEL,
        key_tables.TRAINING,
        key_tables.DATA,
        key_tables.RUNNING,
        key_tables.LOGGING,
        key_tables.GENERATION,
    )
    for name, key in table.items()
}

# Blocks: settings that are themselves a mapping, of which each key has an outcome too.
BLOCKS: Mapping[str, Mapping[str, Key]] = key_tables.BLOCKS

# Spellings of 2021 and duplicates of today, with the key that they stand for.
ALIASES = {"save_interval": "checkpoint_factor", "gas": "gradient_accumulation_steps"}


def judge(key: Key, value: Any) -> Outcome:
    """Return what becomes of a value that `read_value` has accepted."""
    if key.outcome == "ignore":
        return "ignore"
    if key.only is None or any(_equal(value, fine) for fine in key.only):
        return "use"
    return "differ" if key.outcome == "differ" else "refuse"


def find_key(name: str, where: str, keys: Mapping[str, Key] = KEYS) -> Key:
    """Return the key of a name; UserError with the nearest known one where there is none."""
    if name not in keys:
        nearest = difflib.get_close_matches(name, [*keys, *(ALIASES if keys is KEYS else ())], n=1, cutoff=0)[0]
        raise UserError(f"{where}: GPT-NeoX has no setting {name!r}: the nearest is {nearest!r}")
    return keys[name]


def read_value(name: str, key: Key, value: Any, where: str) -> Any:
    """Return a value in the key's kind: `1e-5`, which YAML reads as text, becomes a number where one belongs.

    None stays None. UserError where the value is of another kind, or not one of GPT-NeoX's choices.
    """
    if value is None or key.kind == "any":
        return value
    found, expected = _READERS[key.kind]
    read = found(value)
    if read is None:
        raise UserError(f"{where}: {name} is {value!r}: expected {expected}")
    if key.choices and isinstance(read, str):
        choice = next((choice for choice in key.choices if choice.lower() == read.lower()), None)
        if choice is None:
            raise UserError(f"{where}: {name} is {value!r}: expected one of {', '.join(key.choices)}")
        return choice
    return read


def _equal(value: Any, fine: Any) -> bool:
    """Compare without regard to case, and without taking True for 1."""
    if isinstance(value, str) and isinstance(fine, str):
        return value.lower() == fine.lower()
    return value == fine and isinstance(value, bool) == isinstance(fine, bool)


def _read_number(value: Any) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return None
    return value


def _read_whole(value: Any) -> int | None:
    number = _read_number(value)
    return int(number) if number is not None and number == int(number) else None


def _read_truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    return None


def _read_text(value: Any) -> str | None:
    return None if isinstance(value, (list, dict)) else str(value)


def _read_texts(value: Any) -> list[str] | None:
    values = value if isinstance(value, list) else [value]
    return None if any(isinstance(each, (list, dict)) for each in values) else [str(each) for each in values]


def _read_numbers(value: Any) -> list[float | int] | None:
    numbers = [_read_number(each) for each in value] if isinstance(value, list) else [None]
    return None if None in numbers else [number for number in numbers if number is not None]


def _read_list(value: Any) -> list[Any] | None:
    return value if isinstance(value, list) else None


def _read_block(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


# By kind: the function that reads a value (None for one of another kind), and what is expected.
_READERS: dict[str, tuple[Any, str]] = {
    "whole": (_read_whole, "a whole number"),
    "number": (_read_number, "a number"),
    "truth": (_read_truth, "true or false"),
    "text": (_read_text, "a text"),
    "texts": (_read_texts, "a list of texts"),
    "numbers": (_read_numbers, "a list of numbers"),
    "list": (_read_list, "a list"),
    "block": (_read_block, "a block of settings, {...}"),
}
