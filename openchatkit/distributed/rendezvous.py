"""Rendezvous of the ranks, in the process group that everything else communicates over."""

import atexit
import os
import resource
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from openchatkit.distributed.network import listen, parse_url
from openchatkit.errors import UserError
from openchatkit.libraries import pytorch

# From more ranks on, gloo connects two of them when they first exchange something, and not all at the start.
_CONNECTED_RANKS = 64


def connect(url: str | None, *, rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    """Start torch.distributed: at `url`, or at torchrun's own rendezvous when it is None.

    Rank 0 listens on the address of the URL alone, not on every interface. UserError when its port is taken or the
    other ranks do not connect within `timeout`.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if url is None and not os.environ.get(name)]
    if missing:
        raise UserError(
            f"RANK is set, and {missing[0]} is not: set it to where rank 0 listens, as torchrun does, or give --rank, "
            "--world-size and --dist-url"
        )
    if world_size > _CONNECTED_RANKS:
        pytorch.connect_gloo_on_first_use()
        _allow_open_files(4 * world_size)
    options: dict[str, Any] = {"backend": "gloo", "rank": rank, "world_size": world_size, "timeout": timeout}
    if device.type == "cuda":
        options |= {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    try:
        if url is None:
            dist.init_process_group(init_method="env://", **options)
        else:
            dist.init_process_group(store=_make_store(url, rank, world_size, timeout), **options)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = url or f"tcp://{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"rank {rank} did not meet all of the {world_size} ranks at {where} within "
            f"{timeout.total_seconds():.0f} s: check that each was started and reaches that address ({reason})"
        ) from error


def share_problem(problem: UserError | None, rank: int) -> None:
    """Raise UserError on all ranks, which have just met, if one has a problem; the first rank's is raised."""
    own = None if problem is None else type(problem)(f"rank {rank} on {socket.gethostname()}: {problem}")
    found: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for error in found:
        if error is not None:
            raise error from problem


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as it may by itself: rank 0 has connections of all others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(count, hard) if hard != resource.RLIM_INFINITY else count)
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def disconnect() -> None:
    """Leave the process group. Without this, a rank that ends early can abort its peers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon(status: int) -> None:
    """Let this process end with `status` without waiting for other ranks, once its error is printed.

    Where a reduction is under way, the process groups' destructors wait for it, even as the interpreter ends: gloo's
    for the whole timeout, NCCL's for peers that do not leave.
    """
    if dist.is_initialized():
        atexit.register(_end_at_once, status)


def _end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _make_store(url: str, rank: int, world_size: int, timeout: timedelta) -> Any:
    host, port = parse_url(url)
    options: dict[str, Any] = {"world_size": world_size, "timeout": timeout, "wait_for_workers": False}
    if rank != 0:
        return dist.TCPStore(host, port, is_master=False, **options)  # type: ignore[attr-defined]
    options |= {"is_master": True, "master_listen_fd": listen(host, port).detach()}  # the store closes this socket
    return dist.TCPStore(host, port, **options)  # type: ignore[attr-defined]
