"""Rows, the one form in which parts report: appended to a file and printed at once, so that nothing done is lost.

A row is `passed` or `failed` where something was required of it, `measured` where it holds figures alone, `skipped`
where it cannot exist here, and `cut` where the time ran out. Knows neither torch nor the parts.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, MEASURED, FAILED, SKIPPED, CUT = "passed", "measured", "failed", "skipped", "cut"
BAD = (FAILED, CUT)
NEEDS_CUDA = "needs CUDA"
Values = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One result. `values` has the figures by name, with their unit in the name; `seconds` is what the row took."""

    part: str
    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    values: Values = field(default_factory=dict)


class Unmet(Exception):
    """A requirement that a check did not meet."""


class Skip(Exception):
    """A check that cannot be made here."""


def append(path: Path, row: Row) -> None:
    """Append a row to a file of JSON lines and print it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    print(line(row), flush=True)


def read(path: Path) -> list[Row]:
    """All whole rows of a file; the line that a killed process left half written is no row."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [Row(**json.loads(text)) for text in lines]


def mend(path: Path) -> None:
    """Remove a last line that a killed process left half written, so that the next row begins a line."""
    if path.exists():
        whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
        if rest:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")


def line(row: Row) -> str:
    """Render a row for a terminal."""
    cells = [f"{name} {cell(value)}" for name, value in row.values.items()]
    text = f"{row.status:8} {row.part}: {row.name}" + (f" | {', '.join(cells)}" if cells else "")
    return text + (f" | {row.reason}" if row.reason else "") + f" ({row.seconds:.1f} s)"


def cell(value: Any) -> str:
    """Render a figure: whole numbers and large ones in full, others to three digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "yes" if value is True else "no" if value is False else str(value)


class Result:
    """Findings of one check: figures in `values`, and whether anything was required of them."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.judged = False

    def require(self, condition: bool, reason: str) -> None:
        """Fail the check with this reason unless the condition holds; the figures found so far are kept."""
        self.judged = True
        if not condition:
            raise Unmet(reason)


class Context:
    """The surroundings of a part: device, size and the time that is left. Turns checks into rows."""

    def __init__(self, part: str, path: Path, *, device: str, size: str, seconds: float) -> None:
        self.part, self.path, self.device, self.size = part, path, device, size
        self._deadline = time.monotonic() + seconds

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def pick(self, toy: Any, full: Any) -> Any:
        """The one of two values that belongs to the size."""
        return toy if self.size == "toy" else full

    def left(self) -> float:
        """Seconds until this part is ended."""
        return self._deadline - time.monotonic()

    def check(
        self, name: str, action: Callable[[Result], None], *, needs_cuda: bool = False, needs_seconds: float = 0.0
    ) -> Row:
        """Run one check and report it as a row, whatever its outcome; the part continues after a failure."""
        result, started = Result(), time.monotonic()
        if needs_cuda and not self.cuda:
            status, reason = SKIPPED, NEEDS_CUDA
        elif self.left() <= 0:
            status, reason = CUT, "out of time"
        elif self.left() < needs_seconds:
            status, reason = CUT, f"needs {needs_seconds:.0f} s, {self.left():.0f} are left"
        else:
            status, reason = _outcome(action, result)
        row = Row(self.part, name, status, reason, round(time.monotonic() - started, 3), result.values)
        append(self.path, row)
        return row

    def found(self, part: str, name: str) -> Mapping[str, Any]:
        """The figures of a row that an earlier part has reported; empty where there is none."""
        rows = [row for row in read(self.path) if (row.part, row.name) == (part, name)]
        return rows[-1].values if rows else {}


def _outcome(action: Callable[[Result], None], result: Result) -> tuple[str, str]:
    """The status of a check and the reason for it."""
    try:
        action(result)
    except Skip as skip:
        return SKIPPED, str(skip)
    except Unmet as unmet:
        return FAILED, str(unmet)
    except Exception as error:  # whatever a check raises is its result; the next one may still pass
        return FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        wrong = [name for name, value in result.values.items() if isinstance(value, float) and not math.isfinite(value)]
        for name in wrong:
            result.values[name] = str(result.values[name])  # JSON has no such number
    if wrong:
        return FAILED, f"not finite: {', '.join(wrong)}"
    return (PASSED if result.judged else MEASURED), ""
