"""The machines of a run and which ranks each of them has, from a hostfile or from what this machine holds."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.neox.config import NeoxConfig

_DEFAULT_HOSTFILE = Path("/job/hostfile")
_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s.*)?")


@dataclass(frozen=True)
class Host:
    """A machine and the numbers of its GPUs that a run uses, one a rank. `name` is None for this one alone."""

    name: str | None
    slots: tuple[int, ...]

    @property
    def is_here(self) -> bool:
        """Whether this is the machine that the command runs on."""
        return self.name is None or is_here(self.name)


def find_hosts(config: NeoxConfig) -> list[Host]:
    """Return the hosts of a configuration, in the order of their ranks; see `read_hostfile` and `select_slots`.

    Without a hostfile it is this machine, with a rank a GPU; without GPUs, with the ranks of one replica. Under
    `launcher: slurm` they are the job's nodes. UserError for hosts or slots that are not there.
    """
    path = _find_hostfile(config)
    if path is not None:
        there = read_hostfile(path)
    elif config.get("launcher") == "slurm" or config.get("deepspeed_slurm"):
        there = _read_slurm(config)
    else:
        if named := next((name for name in ("include", "exclude") if config.get(name)), None):
            raise UserError(f"{config.where(named)}: it selects from a hostfile, and there is none: give --hostfile")
        return [Host(None, tuple(range(_count_ranks_here(config))))]
    slots = {name: tuple(range(count)) for name, count in there.items()}
    slots = select_slots(slots, include=config.get("include"), exclude=config.get("exclude"))
    if config.get("num_nodes") > 0:
        if config.get("num_nodes") > len(slots):
            raise UserError(f"{config.where('num_nodes')}: there are {len(slots)} hosts: make it at most that")
        slots = dict(list(slots.items())[: config.get("num_nodes")])
    if wanted := config.get("num_gpus"):
        if short := next((name for name, those in slots.items() if len(those) < wanted), None):
            raise UserError(f"{config.where('num_gpus')}: {short} has {len(slots[short])} slots: make it at most that")
        slots = {name: those[:wanted] for name, those in slots.items()}
    hosts = [Host(name, those) for name, those in slots.items()]
    for host in hosts:
        if host.is_here and 0 < (gpus := count_gpus()) <= max(host.slots):
            raise UserError(f"slot {max(host.slots)} of {host.name}: this machine has {gpus} GPUs, 0 to {gpus - 1}")
    ranks = sum(len(host.slots) for host in hosts)
    if config.get("global_num_gpus") not in (None, ranks):
        raise UserError(f"{config.where('global_num_gpus')}: the hosts have {ranks} slots: leave it out")
    return hosts


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of each host, in the file's order: lines `NAME slots=N`, empty ones, and comments after `#`.

    UserError for another line, for a host that is there twice, and where there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"hostfile {path} cannot be read: {reason}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or not int(match[2]):
            raise UserError(f"{path}:{number}: {line.strip()!r}: expected a line such as worker-1 slots=4")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: {match[1]} is there twice: leave one out")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"hostfile {path} names no host: expected lines such as worker-1 slots=4")
    return hosts


def select_slots(
    hosts: Mapping[str, tuple[int, ...]], *, include: str | None, exclude: str | None
) -> dict[str, tuple[int, ...]]:
    """Return the slots that are left: of `HOST[:SLOT[,SLOT...]]` joined by `@`, or all but those.

    UserError where both are given, for an unknown host or slot, for a number of slots where slots are meant, and where
    nothing is left.
    """
    if include and exclude:
        raise UserError("include and exclude exclude each other: give one of them")
    if not include and not exclude:
        return dict(hosts)
    name, text = ("include", include) if include else ("exclude", exclude)
    named: dict[str, tuple[int, ...]] = {}
    for part in str(text).split("@"):
        host, colon, numbers = part.strip().partition(":")
        if host not in hosts:
            raise UserError(f"{name} {text}: there is no host {host!r}: the hostfile has {', '.join(hosts)}")
        if host in named:
            raise UserError(f"{name} {text}: {host} is there twice: leave one out")
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise UserError(f"{name} {text}: {part!r}: expected HOST, or HOST:SLOT,SLOT with the numbers of slots")
        chosen = tuple(map(int, numbers.split(","))) if colon else hosts[host]
        if strange := [slot for slot in chosen if slot not in hosts[host]]:
            raise UserError(f"{name} {text}: {host} has no slot {strange[0]}: it has 0 to {len(hosts[host]) - 1}")
        named[host] = tuple(dict.fromkeys(chosen))
    if include:
        return {host: named[host] for host in hosts if host in named}
    left = {host: tuple(slot for slot in slots if slot not in named.get(host, ())) for host, slots in hosts.items()}
    if not any(left.values()):
        raise UserError(f"exclude {text}: no slot is left")
    return {host: slots for host, slots in left.items() if slots}


def is_here(name: str) -> bool:
    """Return whether a name or address is one of this machine's: whether a socket can be bound to it."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return name == socket.gethostname()
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def count_gpus() -> int:
    """Return the GPUs that CUDA shows here, without importing torch, which takes seconds."""
    if Path("/dev/kfd").exists():  # AMD's driver, which torch asks
        import torch

        return torch.cuda.device_count()
    there = _count_nvidia_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    return min(there, len([each for each in visible.split(",") if each.strip() not in ("", "-1")]))


def _count_nvidia_gpus() -> int:
    """Return the GPUs of NVIDIA's driver; containers may lack its command."""
    if shutil.which("nvidia-smi") is None:
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def _find_hostfile(config: NeoxConfig) -> Path | None:
    """Return the hostfile: the given one, DLTS_HOSTFILE's, or /job/hostfile if it is there."""
    given = config.get("hostfile") or os.environ.get("DLTS_HOSTFILE")
    if given:
        if not Path(given).is_file():
            place = config.where("hostfile") if config.get("hostfile") else f"DLTS_HOSTFILE {given}"
            raise UserError(f"{place}: there is no such file: name one, or leave it out to use this machine alone")
        return Path(given)
    return _DEFAULT_HOSTFILE if _DEFAULT_HOSTFILE.is_file() else None


def _count_ranks_here(config: NeoxConfig) -> int:
    """Return the ranks of this machine where it is the only one."""
    gpus, wanted = count_gpus(), config.get("global_num_gpus") or config.get("num_gpus")
    if wanted and gpus and wanted > gpus:
        name = "global_num_gpus" if config.get("global_num_gpus") else "num_gpus"
        raise UserError(f"{config.where(name)}: this machine has {gpus} GPUs: make it at most that")
    one_replica = max(config.get("pipe_parallel_size"), 1) * max(config.get("model_parallel_size"), 1)
    ranks: int = wanted or gpus or one_replica
    return ranks


def _read_slurm(config: NeoxConfig) -> dict[str, int]:
    """Return the nodes of this Slurm job, each with its GPUs."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise UserError(f"{config.where('launcher')}: this is no Slurm job: run deepy.py in one, by sbatch or salloc")
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol show hostnames {nodes}: {error}: it should list the job's nodes") from error
    here = os.environ.get("SLURM_GPUS_ON_NODE", "")
    count = config.get("num_gpus") or (int(here) if here.isdecimal() else 0) or count_gpus()
    if not count:
        raise UserError("Slurm gives this job no GPUs: give num_gpus, the ranks a node")
    return dict.fromkeys(listed.stdout.split(), count)
