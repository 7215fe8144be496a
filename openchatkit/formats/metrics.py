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
    """All rows; none when there is no file yet. A last line that a kill has cut is left out, any other broken one is a
    ValueError."""
    rows = _rows(folder)
    if None in rows[:-1]:
        raise ValueError(f"{folder / METRICS}:{rows.index(None) + 1} is no JSON")
    return [row for row in rows if row is not None]


def cut(folder: Path, last_step: int) -> None:
    """Drop the rows of steps after `last_step`, which a run that resumes there writes again, and broken lines: a crash
    of the machine may leave some, and is no reason not to go on."""
    kept = [row for row in _rows(folder) if row is not None and row["step"] <= last_step]
    write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))


def _rows(folder: Path) -> list[dict[str, Any] | None]:
    """A row or None for each line: None where it holds no row."""
    try:
        return list(jsonl.read(folder / METRICS, dict, lambda *_: None))
    except FileNotFoundError:
        return []
