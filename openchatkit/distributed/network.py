"""Addresses and network interfaces, checked before torch.distributed is asked to use them."""

import os
import socket
from urllib.parse import urlsplit

import netifaces

from openchatkit.errors import UserError
from openchatkit.web import is_loopback


def choose_interface(name: str | None, host: str) -> None:
    """Choose the network interface of gloo and NCCL; UserError when there is none of that name.

    Without a name, ranks that meet on this machine's loopback address use the loopback interface, which works where
    the host name does not resolve; otherwise gloo and NCCL choose, or their own environment variables do.
    """
    known = netifaces.interfaces()
    if name is None:
        if not is_loopback(host) or "GLOO_SOCKET_IFNAME" in os.environ:
            return
        name = next((loop for loop in ("lo", "lo0") if loop in known), None)
        if name is None:
            return
    elif name not in known:
        raise UserError(f"--net-interface {name}: this machine has no such interface; it has {', '.join(known)}")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def parse_url(url: str) -> tuple[str, int]:
    """Return host and port of tcp://HOST:PORT."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme == "tcp" and host and port:
            return host, port
    except ValueError:  # unclosed brackets, a port that is not a number
        pass
    raise UserError(f"--dist-url {url}: expected tcp://HOST:PORT, for example tcp://127.0.0.1:7033")


def listen(host: str | None, port: int) -> socket.socket:
    """Return a socket that listens on this address alone, None: on all; UserError when it or the port cannot be used.

    Port 0 takes one that is free.
    """
    if host is None:
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=socket.SOMAXCONN,
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise UserError(
            f"rank 0 cannot listen on {host}:{port} ({error.strerror or error}): another job may be using the port; "
            "give another one with --dist-url"
        ) from error
    return listener
