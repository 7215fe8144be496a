"""metrics.jsonl: one JSON object a line for each step of a training run, and one for each evaluation."""

import json
from pathlib import Path
from typing import Any

from openchatkit import jsonl
from openchatkit.storage import write_text

METRICS = "metrics.jsonl"


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a row; it is in the file when this returns."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all rows, [] when there is no file yet; a cut last line is skipped, ValueError for any other bad line."""
    rows = _rows(folder)
    if None in rows[:-1]:
        raise ValueError(f"{folder / METRICS}:{rows.index(None) + 1} is not JSON")
    return [row for row in rows if row is not None]


def cut(folder: Path, last_step: int) -> None:
    """Drop the rows of steps after `last_step`, which a resumed run writes again, and bad lines that a crash left."""
    kept = [row for row in _rows(folder) if row is not None and row["step"] <= last_step]
    write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def _rows(folder: Path) -> list[dict[str, Any] | None]:
    """Return a row for each line, None where it holds none."""
    try:
        return list(jsonl.read(folder / METRICS, lambda row: dict(**row), lambda *_: None))
    except FileNotFoundError:
        return []
