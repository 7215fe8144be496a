"""The final JSON and the tables in Markdown, made from the rows of all parts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _gpu_check import rows
from _gpu_check.rows import Row


def exit_status(found: Sequence[Row]) -> int:
    """0 where nothing failed and nothing was cut, 1 otherwise, and where there is no row at all."""
    return int(not found or any(row.status in rows.BAD for row in found))


def write(folder: Path, found: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write results.json and results.md."""
    whole = {**about, "exit_status": exit_status(found), "rows": [dataclasses.asdict(row) for row in found]}
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(found), encoding="utf-8")


def markdown(found: Sequence[Row]) -> str:
    """Tables of the rows in their order: a new one for each part, and where a row's figures are other ones.

    A row without figures joins the table that it follows.
    """
    tables: list[list[Row]] = []
    for row in found:
        above = tables[-1] if tables else []
        same = bool(above) and above[-1].part == row.part
        known = {name for other in above for name in other.values}
        if not same or (row.values and known and not known & row.values.keys()):
            tables.append([])
        tables[-1].append(row)
    return "\n\n".join("\n".join(_table(rows_of[0].part, rows_of)) for rows_of in tables) + "\n"


def _table(part: str, group: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(name for row in group for name in row.values))
    head = [part, *names, "result"]
    lines = [_line(head), "|" + "-|" * len(head)]
    for row in group:
        result = f"{row.status}: {row.reason}" if row.reason else row.status
        figures = [rows.cell(row.values[name]) if name in row.values else "" for name in names]
        lines.append(_line([row.name, *figures, result]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
