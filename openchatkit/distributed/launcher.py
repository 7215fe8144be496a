"""Start one process a rank on this machine, pass on their output, and end them together.

Owns the processes and nothing they do: any script that takes `--rank`, `--cuda-id` and `--world-size` will do. The
first rank started here leads: its stderr is the launcher's own, so its progress line is drawn as usual. The others'
stderr is printed line by line, with `[rank i] ` in front, except `error: ` lines. These wait until the end, because
every rank finds a mistake in a command, and the lead has then printed it already.

When a rank fails, the others notice within moments and fail as well; `_Launch.find_cause` picks the failure to name.
No rank outlives the launcher, even when the launcher is killed (see `processes.start_guard`).

With `max_restarts`, all ranks are started again after an end by chance: one was killed by a signal, or lost another.
Restarts count until a rank notes progress (`processes.note_progress`), and come after ever longer waits. A run that
notes that it was asked to stop (`processes.note_stop`) has ended well.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from openchatkit import cli
from openchatkit.distributed import processes
from openchatkit.distributed.processes import Rank, RankNotes
from openchatkit.errors import DEFECT, RESUMABLE, USER_ERROR, UserError

_OWN_FLAGS = ("--rank", "--cuda-id", "--world-size")
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 2.0
_KILL_SECONDS = 10.0
_KILL_SECONDS_USER_ERROR = 5.0
_INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, 130)
_RESTART_SECONDS = 5.0
_MOST_RESTART_SECONDS = 60.0


def launch(
    script: Path,
    arguments: Sequence[str],
    *,
    world_size: int,
    first_rank: int = 0,
    ranks_here: int | None = None,
    max_restarts: int = 0,
    restart_delay: float = _RESTART_SECONDS,
) -> int:
    """Run `script` once for each of ranks `first_rank`, `first_rank` + 1, ... and wait for all.

    Returns 0 if all ended with 0; otherwise the status of the rank that failed first if it is 1, 2 or 75, else 1.
    SIGINT, SIGTERM and SIGHUP are passed on to all ranks, which may then save and end with 75; a second one kills.
    After an end by chance, all ranks are started again, at most `max_restarts` times in a row without progress; the
    first time after `restart_delay` seconds, then after twice as long each time, up to a minute.
    UserError for a missing script, flags that the launcher sets itself, or ranks beyond the world.
    """
    here = world_size - first_rank if ranks_here is None else ranks_here
    if here < 1 or first_rank + here > world_size:
        raise UserError(
            f"ranks {first_rank} to {first_rank + here - 1} do not fit a world of {world_size}: "
            "--first-rank plus --ranks-here must be at most --world-size"
        )
    if not script.is_file():
        raise UserError(f"no script {script}: the launcher is given the training script, then that script's arguments")
    for argument in arguments:
        if argument.split("=")[0] in _OWN_FLAGS:
            raise UserError(
                f"{argument} comes after {script.name}, but the launcher sets it for each rank: leave it out"
            )
    commands = []
    for local in range(here):
        identity = f"--rank {first_rank + local} --cuda-id {local} --world-size {world_size}"
        commands.append([sys.executable, str(script), *arguments, *identity.split()])
    with processes.collect_requests() as requests, processes.collect_notes() as notes:
        restarts = 0
        while True:
            before = notes.progress
            notes.forget_end()
            with processes.start_guard() as guard:
                attempt = _Launch(guard, requests, notes)
                status = attempt.run(commands, first_rank)
            if requests or not max_restarts or notes.stop or not attempt.ended_by_chance:
                return status
            restarts = 1 if notes.progress != before else restarts + 1
            if restarts > max_restarts:
                attempt.print_line(
                    f"error: given up: no new checkpoint in {max_restarts} restarts in a row (--max-restarts)"
                )
                return status
            seconds = min(restart_delay * 2 ** (restarts - 1), _MOST_RESTART_SECONDS)
            attempt.print_line(
                f"starting all ranks again in {seconds:g} s (restart {restarts} of {max_restarts} without a new "
                "checkpoint)"
            )
            if _sleep_until_asked(seconds, requests):
                attempt.print_line(
                    "error: stopped before a restart; the same command resumes from the newest checkpoint"
                )
                return RESUMABLE


def _sleep_until_asked(seconds: float, requests: list[int]) -> bool:
    """Sleep, but no longer than until the user asks for an end; returns whether that happened."""
    end = time.monotonic() + seconds
    while not requests and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return bool(requests)


class _Launch:
    """The ranks of one launch, from the first one's start to the last one's end."""

    def __init__(self, guard: IO[bytes], requests: list[int], notes: RankNotes) -> None:
        self.guard = guard
        self.requests = requests
        self.notes = notes
        self.ranks: list[Rank] = []
        self.output = threading.Lock()

    def run(self, commands: list[list[str]], first_rank: int) -> int:
        environment = os.environ | self.notes.environment | {"LOCAL_WORLD_SIZE": str(len(commands))}
        if len(commands) > 1 and not environment.get("OMP_NUM_THREADS"):
            # As torchrun does: ranks share the cores, and results equal to the bit need the same threads a rank.
            environment["OMP_NUM_THREADS"] = "1"
        try:
            for number, command in enumerate(commands, first_rank):
                self.start(number, command, environment, lead=number == first_rank)
            self.wait()
        finally:
            failed = bool(self.failures)
            for rank in self.ranks:
                if failed or rank.status is None:
                    rank.kill_group()
                rank.process.wait()
        return self.report()

    def start(self, number: int, command: list[str], environment: dict[str, str], *, lead: bool) -> None:
        # In sessions of their own: Ctrl-C on a terminal reaches the launcher alone, which passes it on once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=None if lead else subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        rank = Rank(number, process)
        self.ranks.append(rank)
        processes.write_to_guard(self.guard, str(process.pid))
        if not lead:
            rank.reader = threading.Thread(target=self.pass_on, args=(rank,), daemon=True)
            rank.reader.start()

    def pass_on(self, rank: Rank) -> None:
        """Copy a rank's stderr, in a thread of its own; hold back lines that the lead may print as well."""
        assert rank.process.stderr is not None
        for line in rank.process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            if text.startswith("error: "):
                rank.held_lines.append(text)
            else:
                self.print_line(f"[rank {rank.number}] {text}")

    def print_line(self, line: str) -> None:
        # On a terminal the lead's progress line may be where this line goes.
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        with self.output:
            sys.stderr.write(f"{clear}{line}\n")
            sys.stderr.flush()

    def wait(self) -> None:
        """Wait until all have ended: pass requests on, and stop the other ranks when one has failed."""
        handled = 0
        while True:
            for rank in self.ranks:
                rank.poll()
            running = [rank for rank in self.ranks if rank.status is None]
            if not running:
                return
            while handled < len(self.requests):
                self.interrupt(running, self.requests[handled], again=handled > 0)
                handled += 1
            if self.failures:
                self.stop(running)
            time.sleep(_POLL_SECONDS)

    def interrupt(self, running: list[Rank], signum: int, *, again: bool) -> None:
        for rank in running:
            if again:
                rank.stopped_by_us = True
                rank.kill_group()
            else:
                # A closed terminal means the same as SIGTERM, which ranks handle.
                rank.send(signal.SIGTERM if signum == signal.SIGHUP else signum)

    @property
    def failures(self) -> list[Rank]:
        """Ranks that failed by themselves; 75 is no failure when all were asked to save and end."""
        fine = (0, RESUMABLE) if self.requests else (0,)
        return [
            rank
            for rank in self.ranks
            if rank.status is not None and rank.status not in fine and not rank.stopped_by_us
        ]

    @property
    def ended_by_chance(self) -> bool:
        """Whether a rank was killed or lost another one, so that the same command may well do better."""
        if not self.failures:
            return False
        status = self.find_cause().status
        assert status is not None
        return status == RESUMABLE or status < 0

    def find_cause(self) -> Rank:
        """Return the failure to name: the gravest kind, and the earliest of that kind."""
        return min(self.failures, key=lambda rank: (rank.severity, rank.ended))

    def stop(self, running: list[Rank]) -> None:
        """Send SIGTERM to the running ranks once the cause is certain, SIGKILL to those that do not end."""
        cause = self.find_cause()
        assert cause.status is not None
        elapsed = time.monotonic() - min(rank.ended for rank in self.failures)
        limit = _KILL_SECONDS_USER_ERROR if cause.status == USER_ERROR else _KILL_SECONDS
        for rank in running:
            rank.send(signal.SIGCONT)  # A suspended rank could not end.
            if elapsed > limit:
                rank.kill_group()
            elif not rank.stopped_by_us and (cause.status < 0 or elapsed > _SETTLE_SECONDS):
                rank.poll()
                if rank.status is not None:
                    continue  # It ended by itself since the last poll, and its error lines are to be printed.
                rank.stopped_by_us = True
                rank.send(signal.SIGTERM)

    def report(self) -> int:
        """Print the lines held back and how it ended; returns the launcher's exit status."""
        for rank in self.ranks:
            if rank.reader is not None:
                rank.reader.join(timeout=1.0)
        cause = self.find_cause() if self.failures else None
        others_spoke = self.print_held_lines(cause) or self.ranks[0].status == RESUMABLE
        if cause is None:
            if any(rank.stopped_by_us for rank in self.ranks):
                self.print_line("error: killed by a second signal before all ranks had ended")
                return DEFECT
            return RESUMABLE if any(rank.status for rank in self.ranks) else 0
        if self.requests and cause.status in _INTERRUPTED:
            self.print_line(
                "error: stopped before a checkpoint could be written; the same command resumes from the newest one"
            )
            return RESUMABLE
        if cause.died and others_spoke and f"rank {cause.number} on " in self.notes.verdict:
            if cause.status != -signal.SIGKILL:  # their line says as much of that
                self.print_line(f"[rank {cause.number}] {cause.describe_end()}")
        elif cause.status != USER_ERROR or self.ranks[0].status != USER_ERROR:
            stopped = "; the other ranks were stopped" if any(rank.stopped_by_us for rank in self.ranks) else ""
            resumable = cause.status in (RESUMABLE, -signal.SIGKILL)
            advice = "; the same command resumes from the newest checkpoint" if resumable else ""
            self.print_line(f"error: {cause.describe_end()}{stopped}{advice}")
        return cause.status if cause.status in (DEFECT, USER_ERROR, RESUMABLE) else DEFECT

    def print_held_lines(self, cause: Rank | None) -> bool:
        """Print the lines held back, once each, except those of ranks that ended in the same way as the lead.

        Of a lead that was killed, the others say where it was. Returns whether anything was printed.
        """
        lead = self.ranks[0]
        lead_was_killed = cause is lead and lead.died
        printed: set[str] = set()
        for rank in self.ranks:
            ended_as_lead = lead.status and rank.status == lead.status
            if ended_as_lead or (rank.stopped_by_us and not lead_was_killed):
                continue
            for line in rank.held_lines:
                if line not in printed:
                    self.print_line(f"[rank {rank.number}] {line}")
                printed.add(line)
        return bool(printed)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """`training/launch.py`: the launcher as a command."""
    parser = cli.Parser(
        prog="training/launch.py",
        description="Start one process a rank of a training script on this machine, and end them together.",
    )
    parser.add_argument("--world-size", type=cli.positive_int, required=True, help="ranks on all machines together")
    parser.add_argument("--first-rank", type=cli.natural, default=0, help="the first rank on this machine")
    parser.add_argument("--ranks-here", type=cli.positive_int, help="ranks on this machine (default: all that follow)")
    parser.add_argument(
        "--max-restarts",
        type=cli.natural,
        default=0,
        help="restarts in a row without a new checkpoint, after a rank was killed or lost another; 0: none",
    )
    parser.add_argument(
        "--restart-delay",
        type=cli.positive_float,
        default=_RESTART_SECONDS,
        help="seconds before the first of these; each further one waits twice as long, up to a minute",
    )
    parser.add_argument("script", type=Path, help="the script to run, as training/dist_clm_train.py")
    parser.add_argument("arguments", nargs="...", help="its arguments; --rank, --cuda-id and --world-size are added")
    given = parser.parse_args(argv)
    return launch(
        given.script,
        given.arguments,
        world_size=given.world_size,
        first_rank=given.first_rank,
        ranks_here=given.ranks_here,
        max_restarts=given.max_restarts,
        restart_delay=given.restart_delay,
    )
