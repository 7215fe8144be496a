"""Parts of the launcher: a rank's process, the guard that outlives the launcher, signals as requests, ranks' notes."""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from openchatkit.errors import RESUMABLE, USER_ERROR

# Names the folder of the notes that ranks leave for the launcher, in the environment that it gives them.
_NOTES_FOLDER = "OPENCHATKIT_RANK_NOTES"

# A second signal this soon is an echo of the first: timeout(1) and batch systems signal whole process groups.
ECHO_SECONDS = 1.0

# Runs in a session of its own, so that nothing meant for the launcher reaches it. It learns the ranks' process groups
# line by line; when the pipe closes without "done", the launcher has died and the ranks are killed.
_GUARD = """
groups=
while read -r word; do
    if [ "$word" = done ]; then exit 0; fi
    groups="$groups -$word"
done
[ -z "$groups" ] || kill -s KILL -- $groups 2>/dev/null
"""


@dataclass
class Rank:
    """A rank's process, and when and how it ended."""

    number: int
    process: subprocess.Popen[bytes]
    reader: threading.Thread | None = None
    held_lines: list[str] = field(default_factory=list)
    status: int | None = None
    ended: float = 0.0
    stopped_by_us: bool = False

    def poll(self) -> None:
        """Note the exit status once there is one."""
        if self.status is None and (status := self.process.poll()) is not None:
            self.status, self.ended = status, time.monotonic()

    def send(self, signum: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.status is None:
            self.process.send_signal(signum)

    def kill_group(self) -> None:
        """SIGKILL the rank and all processes that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def died(self) -> bool:
        """Whether a signal ended the process."""
        return self.status is not None and self.status < 0

    @property
    def severity(self) -> int:
        """Order of causes, gravest first: a rank that lost a peer ends with 75 or 1, never by a signal or with 2."""
        assert self.status, self
        return {RESUMABLE: 3, USER_ERROR: 1}.get(self.status, 0 if self.died else 2)

    def describe_end(self) -> str:
        assert self.status, self
        if self.status == -signal.SIGKILL:
            return f"rank {self.number} was killed (likely out of memory)"
        if self.died:
            return f"rank {self.number} was ended by {signal.Signals(-self.status).name}"
        return f"rank {self.number} ended with status {self.status}"


@contextlib.contextmanager
def start_guard() -> Iterator[IO[bytes]]:
    """Start a helper that kills the process groups written to it (see `write_to_guard`) should the launcher die."""
    helper = subprocess.Popen(["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, start_new_session=True)
    assert helper.stdin is not None
    try:
        yield helper.stdin
    finally:
        write_to_guard(helper.stdin, "done")
        with contextlib.suppress(BrokenPipeError):
            helper.stdin.close()
        helper.wait()


def write_to_guard(guard: IO[bytes], word: str) -> None:
    """Write a word to the guard: a process group, or `done`."""
    # If the guard itself has been killed, the ranks go on without one.
    with contextlib.suppress(BrokenPipeError):
        guard.write(f"{word}\n".encode())
        guard.flush()


@contextlib.contextmanager
def collect_requests() -> Iterator[list[int]]:
    """Collect the signals that ask for an end instead of dying of them; one that is ignored (nohup) stays ignored."""
    received: list[int] = []
    last = -ECHO_SECONDS

    def request(signum: int, _frame: object) -> None:
        nonlocal last
        if time.monotonic() - last > ECHO_SECONDS:
            received.append(signum)
            last = time.monotonic()

    previous = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            previous[signum] = signal.signal(signum, request)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def has_ranks_elsewhere(world_size: int) -> bool:
    """Whether other machines have ranks of this run, by what the launcher and torchrun say of this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size) < world_size


class RankNotes:
    """Notes that ranks leave in a folder for the launcher that started them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """The variable that a rank's environment must hold."""
        return {_NOTES_FOLDER: str(self._folder)}

    @property
    def progress(self) -> str:
        """How far ranks have come, over all restarts, as the last of them noted by `note_progress`."""
        return self._read("progress")

    @property
    def stop(self) -> str:
        """Why ranks stopped as they were asked to (`note_stop`); empty if they did not."""
        return self._read("stop")

    @property
    def verdict(self) -> str:
        """The line of a rank about another one's end (`note_verdict`); empty if there was none."""
        return self._read("verdict")

    def forget_end(self) -> None:
        """Remove what was noted about an end, before ranks start again."""
        for name in ("stop", "verdict"):
            (self._folder / name).unlink(missing_ok=True)

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


@contextlib.contextmanager
def collect_notes() -> Iterator[RankNotes]:
    """Make the folder for the notes of ranks, which is there for as long as the launcher runs."""
    with tempfile.TemporaryDirectory(prefix="openchatkit_notes_") as folder:
        yield RankNotes(Path(folder))


def note_progress(progress: object) -> None:
    """Note for the launcher, if it started this process, that work is done that a restart will not repeat."""
    _note("progress", str(progress))


def note_stop(reason: str) -> None:
    """Note for the launcher that this rank ends because it was asked to, so that it is not started again."""
    _note("stop", reason)


def note_verdict(line: str) -> None:
    """Note for the launcher what this rank says of another one's end."""
    _note("verdict", line)


def _note(name: str, text: str) -> None:
    if folder := os.environ.get(_NOTES_FOLDER):
        with contextlib.suppress(OSError):  # a launcher that has died, or a full disk
            (Path(folder) / name).write_text(text, encoding="utf-8")
