"""JSON Lines: one JSON value a line, read with the number of each line, so that errors can name it."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


def read(
    path: Path, make: Callable[[Any], _T], bad: Callable[[int, Exception], _T], *, skip_blank: bool = False
) -> Iterator[_T]:
    """Yield `make(value)` for the value of each line.

    Where a line is not JSON, or `make` raises ValueError, TypeError or KeyError for it, `bad(number, error)` raises the
    caller's error or returns a substitute. Lines are counted from 1. OSError when the file cannot be read.
    """
    # At once: read in pieces, a line that is being written could come as two bad ones.
    for number, line in enumerate(io.BytesIO(path.read_bytes()), 1):
        if skip_blank and not line.strip():
            continue
        try:
            made = make(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            made = bad(number, error)
        yield made


def parse_object(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None where it holds anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
