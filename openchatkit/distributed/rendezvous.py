"""How ranks find each other: the network interface, the meeting point, and clear errors when either fails."""

import ipaddress
import os
import socket
from datetime import timedelta
from urllib.parse import urlsplit

import netifaces
import torch
import torch.distributed as dist

from openchatkit.errors import UserError


def choose_interface(name: str | None, host: str) -> None:
    """Tell gloo and NCCL which network interface to use; raise UserError when there is none of that name.

    Without a name, ranks that meet on this machine's loopback address use the loopback interface, which works where
    the host name does not resolve; otherwise gloo and NCCL choose, or their own environment variables do.
    """
    known = netifaces.interfaces()
    if name is None:
        if not _is_loopback(host) or "GLOO_SOCKET_IFNAME" in os.environ:
            return
        name = next((loop for loop in ("lo", "lo0") if loop in known), None)
        if name is None:
            return
    elif name not in known:
        raise UserError(f"--net-interface {name}: this machine has no such interface; it has {', '.join(known)}")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = parts = None
    if parts is None or parts.scheme != "tcp" or not host or not port:
        raise UserError(f"--dist-url {url}: expected tcp://HOST:PORT, for example tcp://127.0.0.1:7033")
    return host, port


def connect(url: str | None, *, rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    """Start torch.distributed: at `url`, or at torchrun's own meeting point when it is None.

    Rank 0 listens on the address of the URL alone, not on every interface. UserError when its port is taken or the
    other ranks do not come within `timeout`.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"backend": backend, "rank": rank, "world_size": world_size, "timeout": timeout}
    if device.type == "cuda":
        options["device_id"] = device
    try:
        if url is None:
            dist.init_process_group(init_method="env://", **options)
        else:
            dist.init_process_group(store=_store(url, rank, world_size, timeout), **options)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = url or f"tcp://{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rank {rank} did not meet the other {world_size - 1} at {where} within {timeout.total_seconds():.0f} s: "
            f"check that every rank was started and reaches that address ({_first_line(error)})"
        ) from error


def disconnect() -> None:
    """Leave the job in good order; without it a rank that ends early can abort its peers."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(url: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    host, port = parse_url(url)
    if rank != 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    listener = _listen(host, port)
    # The store owns the descriptor from here on.
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        master_listen_fd=listener.detach(),
        wait_for_workers=False,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise UserError(
            f"rank 0 cannot listen on {host}:{port} ({error.strerror}): another job may be using the port; "
            "give another one with --dist-url"
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
