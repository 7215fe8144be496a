"""Runs parts one after another, each in a process with a time limit of its own, and accounts for what they leave out.

Owns the budget: a part gets its limit or what is left of the whole, whichever is less; one for which nothing is left is
a row `cut`. A part that crashes, hangs or says nothing is a row too, and never stops the next one.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from _gpu_check import rows
from _gpu_check.rows import Row

# With less than this, a part would only import torch.
LEAST_SECONDS = 5.0
# What a part is given beyond its limit to report that it is out of time.
GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Part:
    """`expected` is what it should take on one H100, `limit` when it is ended, both in seconds."""

    name: str
    expected: float
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


# The command of a part, given the seconds that it has.
Command = Callable[[Part, float], Sequence[str]]


def run(
    parts: Sequence[Part], command: Command, *, seconds: float, folder: Path, after: Callable[[], None] = lambda: None
) -> list[Row]:
    """Run the parts in order within `seconds`; returns all rows of `folder`/rows.jsonl. `after` follows each part."""
    deadline = time.monotonic() + seconds
    path = folder / "rows.jsonl"
    for part in parts:
        left = deadline - time.monotonic()
        if left < min(LEAST_SECONDS, part.limit):
            rows.append(path, Row(part.name, "all", rows.CUT, f"out of time: {max(left, 0):.0f} s of {seconds:g} left"))
        else:
            _run(part, command, min(part.limit, left), path)
        after()
    return rows.read(path)


def _run(part: Part, command: Command, limit: float, path: Path) -> None:
    known, started = len(rows.read(path)), time.monotonic()
    log = path.parent / f"{part.name}.log"
    # The part itself stops beginning checks a little before it is ended.
    argv = command(part, max(limit - GRACE_SECONDS, 0.0))
    with open(log, "wb") as errors:
        # A request to end that comes while the part is being started waits until it can be ended, too.
        requests: list[int] = []
        handler = signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
        try:
            process = subprocess.Popen(
                argv, stderr=errors, env={**os.environ, **part.environment}, start_new_session=True
            )
        except BaseException:
            signal.signal(signal.SIGTERM, handler)
            raise
        try:
            signal.signal(signal.SIGTERM, handler)
            for number in requests:
                signal.raise_signal(number)
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # What it started belongs to its group and ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows.mend(path)
    if status is None:
        reason = rows.CUT, f"ended after {limit:.0f} s"
    elif status < 0:
        reason = rows.FAILED, f"killed by signal {-status}"
    elif status:
        reason = rows.FAILED, f"exit status {status}: {_last_line(log)}"
    elif len(rows.read(path)) == known:
        reason = rows.FAILED, "reported nothing"
    else:
        return
    rows.append(
        path,
        Row(
            part.name,
            "all" if len(rows.read(path)) == known else "the rest",
            *reason,
            round(time.monotonic() - started, 3),
        ),
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "nothing on stderr"
