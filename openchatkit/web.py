"""Servers on this machine: sockets to listen on, uvicorn's settings, pages that may run their own script alone.

Owns what the chat's server and the page of a run in training share; starlette and uvicorn are of the extra `server`.
"""

import base64
import hashlib
import importlib.util
import ipaddress
import re
import socket
from typing import TYPE_CHECKING

from openchatkit.errors import UserError
from openchatkit.libraries import uvicorn_http

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp


def check_installed(what: str) -> None:
    """Raise UserError, which says that `what` needs them, where the packages of a server are missing."""
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UserError(f"{what} needs starlette and uvicorn, which are not installed: pip install -e '.[server]'")


def bind(
    host: str, port: int, *, flags: str | None = None, advice: str = "--port 0 takes a free port"
) -> socket.socket:
    """Bind a socket to this address, without listening yet; UserError, which names `flags`, when that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        given = flags or f"--host {host} --port {port}"
        raise UserError(f"{given} cannot be listened on: {reason}; {advice}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def settings(
    app: "ASGIApp", *, connections: int = 500, access_log: bool = False, patience: float = uvicorn_http.PATIENCE
) -> "uvicorn.Config":
    """Return uvicorn's configuration for the application: silent, plain HTTP, a limited number of `connections`.

    `patience` is for silent clients, in seconds; see `uvicorn_http`.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        loop="asyncio",
        http=uvicorn_http.protocol(patience),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=None if access_log else "critical",
        access_log=access_log,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections,
        timeout_keep_alive=uvicorn_http.KEEP_ALIVE,
        timeout_graceful_shutdown=10,
    )


def page_headers(page: bytes) -> dict[str, str]:
    """Return the headers of a page with one script and one style."""
    return {"Content-Security-Policy": f"{page_policy(page)}; frame-ancestors 'none'", "Cache-Control": "no-cache"}


def page_policy(page: bytes) -> str:
    """Return the policy of such a page: it may run its own script and style, and ask its own server alone."""
    script, style = (_digest(page, tag) for tag in (b"script", b"style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(page: bytes, tag: bytes) -> str:
    found = re.search(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
    assert found is not None, tag
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
