"""metrics.jsonl: one JSON object a line for each step of a training run, and one for each evaluation."""

import json
from pathlib import Path
from typing import Any

from openchatkit.paths import write_text

METRICS = "metrics.jsonl"


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a row; it is in the file when this returns."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows; none when there is no file yet. A last line that a kill has cut is left out."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return rows


def cut(folder: Path, last_step: int) -> None:
    """Drop the rows of steps after `last_step`, and a line cut short: a run that resumes there writes them again."""
    kept = [row for row in read(folder) if row["step"] <= last_step]
    write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
