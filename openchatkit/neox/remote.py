"""Commands that start each host's ranks, here or by ssh or srun, and end together.

The first host's failure to be seen decides; the others, whose ranks notice that they lost their peers, are asked to
end after a while. A remote command ends when its standard input does: so it does not outlive this one.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openchatkit.distributed import processes
from openchatkit.errors import DEFECT, RESUMABLE, USER_ERROR, UserError
from openchatkit.neox.hosts import Host
from openchatkit.paths import ROOT

# Variables handed on to all hosts, by how their names begin (GPT-NeoX's, and gloo's), and a file that lists more.
# MLflow's, which GPT-NeoX hands on too, are not used here, may hold a password, and would stand in a command line.
_EXPORTED = ("NCCL", "PYTHON", "MV2", "UCX", "GLOO")
_ENVIRONMENT_FILE = ".deepspeed_env"

_POLL_SECONDS = 0.1
_NOTICE_SECONDS = 30.0  # in which the ranks of other hosts notice a lost peer, and say so
_KILL_SECONDS = 60.0

# Runs a command that is asked to end (SIGTERM) when the standard input ends, which ssh and srun close as they die.
_UNTIL_INPUT_ENDS = """cd {folder} || exit 2
exec 3<&0
{program} </dev/null & child=$!
{{ cat <&3; kill -s TERM $child; }} >/dev/null 2>&1 & watch=$!
wait $child; status=$?
kill $watch 2>/dev/null
exit $status"""


@dataclass(frozen=True)
class HostCommand:
    """The shell command of one host: `folder` to run in, and the `program` with its environment."""

    host: Host
    folder: Path
    program: str

    @property
    def text(self) -> str:
        """The command as a person types it on that host."""
        return f"cd {shlex.quote(str(self.folder))} && {self.program}"


def make_commands(
    hosts: Sequence[Host], script: Path, arguments: Sequence[str], *, environment: Mapping[str, str]
) -> list[HostCommand]:
    """Return the command of each host, which starts its ranks in the current folder."""
    world_size = sum(len(host.slots) for host in hosts)
    commands, first = [], 0
    for host in hosts:
        # Without a hostfile the GPUs are those that are visible here.
        slots = {} if host.name is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.slots))}
        settings = [f"{name}={shlex.quote(value)}" for name, value in {**environment, **slots}.items()]
        ranks = f"--world-size {world_size} --first-rank {first} --ranks-here {len(host.slots)}"
        program = shlex.join([sys.executable, str(ROOT / "training" / "launch.py")])
        started = f"env {' '.join(settings)} {program} {ranks} {shlex.join([str(script), *arguments])}"
        commands.append(HostCommand(host, Path.cwd(), started))
        first += len(host.slots)
    return commands


def collect_environment() -> dict[str, str]:
    """Return the variables for all hosts; UserError for a line of `.deepspeed_env` that is not NAME=VALUE."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_EXPORTED)}
    for folder in dict.fromkeys((Path.home(), Path.cwd())):
        path = folder / _ENVIRONMENT_FILE
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, equals, value = line.partition("=")
            if not line.strip():
                continue
            if not equals or not name.strip().isidentifier():
                raise UserError(f"{path}:{number}: {line!r}: expected NAME=VALUE")
            found[name.strip()] = value.strip()
    return found


def start_command(command: HostCommand, launcher: str, comment: str | None = None) -> list[str]:
    """Return what starts a host's command from here."""
    host = command.host.name
    wrapped = _UNTIL_INPUT_ENDS.format(folder=shlex.quote(str(command.folder)), program=command.program)
    if launcher == "slurm":
        given = {"--comment": comment, "--cpus-per-task": os.environ.get("SLURM_CPUS_ON_NODE")}
        options = [f"{name}={value}" for name, value in given.items() if value]
        return ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", *options, "sh", "-c", wrapped]
    if command.host.is_here:
        return ["sh", "-c", wrapped]
    return ["ssh", "-o", "BatchMode=yes", str(host), wrapped]


def run_commands(commands: Sequence[HostCommand], *, launcher: str, comment: str | None = None) -> int:
    """Start all hosts and wait for all; return 0, or the status of the first that failed.

    SIGINT, SIGTERM and SIGHUP ask all ranks to save and end; a second one kills.
    """
    with processes.collect_requests() as requests:
        running: dict[subprocess.Popen[bytes], HostCommand] = {}
        try:
            for command in commands:
                running[_start(command, launcher, comment)] = command
            return _wait(running, requests)
        finally:
            for process in running:
                with contextlib.suppress(OSError):
                    assert process.stdin is not None
                    process.stdin.close()
                if process.poll() is None:
                    process.kill()
                process.wait()


def _start(command: HostCommand, launcher: str, comment: str | None) -> subprocess.Popen[bytes]:
    program = start_command(command, launcher, comment)
    try:
        # In sessions of their own: Ctrl-C reaches this process alone, which passes it on by closing their input.
        return subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise UserError(
            f"{command.host.name}: cannot start {program[0]}: {error.strerror}: install it, or start "
            "the command of each host yourself: --print-commands shows them"
        ) from error


def _wait(running: Mapping[subprocess.Popen[bytes], HostCommand], requests: Sequence[int]) -> int:
    cause: tuple[int, float] | None = None
    asked: float | None = None
    while any(process.poll() is None for process in running):
        now = time.monotonic()
        failed = [process.returncode for process in running if process.returncode]
        if cause is None and failed and not requests:
            cause = (failed[0], now)
        if asked is None and (requests or (cause is not None and now - cause[1] > _NOTICE_SECONDS)):
            asked = now
            for process in running:
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()
        if asked is not None and (len(requests) > 1 or (not requests and now - asked > _KILL_SECONDS)):
            for process in running:
                if process.poll() is None:
                    process.kill()
        time.sleep(_POLL_SECONDS)
    for process, command in running.items():
        if process.returncode not in (0, RESUMABLE, USER_ERROR):
            print(f"error: {command.host.name} ended with status {process.returncode}", file=sys.stderr, flush=True)
    failed = [process.returncode for process in running if process.returncode]
    status = cause[0] if cause is not None else next(iter(failed), 0)
    return status if status in (0, DEFECT, USER_ERROR, RESUMABLE) else DEFECT
