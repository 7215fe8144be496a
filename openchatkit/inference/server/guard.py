"""Who may ask: checks of Host, Origin, rate and token that every request passes before anything else looks at it.

A page on the web can make a visitor's browser send requests to this machine, with a name of the page's own that was
made to mean 127.0.0.1 (DNS rebinding), so being reachable by nobody else is not enough: a request must name a host of
ours, and what asks for work must come from our own page, from no page at all, or from an origin that was allowed by
name. Only such an origin is sent CORS headers, by which its pages may read the answers.
"""

import hmac
import ipaddress
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from openchatkit.inference.server.errors import ApiError
from openchatkit.inference.server.rate import Rate

# Messages of ASGI.
Scope = dict[str, Any]

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
# A name or IPv4 address, or an IPv6 address in brackets; then a port or none.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """An ASGI application around another. `host` is what the server listens on, `names` other names it is called by.

    `origins` are those of the pages that may use it besides its own.
    With a `token`, every path under /v1 needs it as `Authorization: Bearer`; the `rate` counts requests there, those
    without the token too.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        names: Collection[str] = (),
        origins: Collection[str] = (),
        token: str | None = None,
        rate: Rate | None = None,
    ) -> None:
        self._app = app
        self._rate = rate
        self._names = {name.lower() for name in (*_LOCAL_NAMES, host, *names)}
        self._origins = frozenset(origins)
        self._any_address = host in ("0.0.0.0", "::")
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with what is wrong with it."""

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        added = [*_HEADERS, *self._cors(headers)]

        async def send_guarded(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            self._check_names(scope, headers)
            if self._asks_whether_to_ask(scope, headers):
                await send_guarded({"type": "http.response.start", "status": 204, "headers": _preflight(headers)})
                await send_guarded({"type": "http.response.body"})
                return
            if scope["path"].startswith("/v1"):
                self._check_rate(scope["client"])
                self._check_token(headers.get(b"authorization", ""))
        except ApiError as error:
            await send_error(error, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _cors(self, headers: Mapping[bytes, str]) -> list[tuple[bytes, bytes]]:
        """The headers that let a page of an allowed origin read the answer."""
        if not self._origins:
            return []
        vary = [(b"vary", b"Origin")]
        origin = headers.get(b"origin", "")
        if origin not in self._origins:
            return vary
        exposed = (b"access-control-expose-headers", b"Retry-After, X-Ignored-Fields")
        return [*vary, (b"access-control-allow-origin", origin.encode("latin-1")), exposed]

    def _asks_whether_to_ask(self, scope: Scope, headers: Mapping[bytes, str]) -> bool:
        """Whether this is the request that a browser sends before an allowed page's own, without its token."""
        allowed = headers.get(b"origin", "") in self._origins
        return allowed and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers

    def _check_names(self, scope: Scope, headers: Mapping[bytes, str]) -> None:
        host = headers.get(b"host", "")
        if not self._is_ours(host):
            message = f"this server does not go by the Host {host[:100]!r}: --allow-host adds a name"
            raise ApiError(403, message, code="wrong_host")
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._origins and scope["method"] not in ("GET", "HEAD"):
            scheme, _, place = origin.partition("://")
            if scheme not in ("http", "https") or place.lower() != host.lower():
                message = "pages of other origins may not use this server: --allow-origin adds one"
                raise ApiError(403, message, code="wrong_origin")

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = (match[1] or match[2]).lower()
        return name in self._names or (self._any_address and _is_address(name))

    def _check_rate(self, client: tuple[str, int] | None) -> None:
        wait = self._rate.take(_counted_as(client[0]) if client else "") if self._rate else 0
        if wait:
            message = "too many requests in a minute from this address: slow down"
            headers = {"Retry-After": str(math.ceil(wait))}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    def _check_token(self, authorization: str) -> None:
        if self._token is None:
            return
        scheme, _, given = authorization.partition(" ")
        # In constant time, so that how long a refusal takes says nothing about the token.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            message = "this server needs its token: send it as the API key (Authorization: Bearer ...)"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _preflight(headers: Mapping[bytes, str]) -> list[tuple[bytes, bytes]]:
    """The headers that let a page send what it asks for: any of the methods that there are, with any headers."""
    asked = headers.get(b"access-control-request-headers", "")
    answer = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", asked.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]
    if headers.get(b"access-control-request-private-network") == "true":  # a page on the web, a server on its network
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


async def send_error(error: ApiError, send: Any) -> None:
    """Answer with an error; the connection ends with it where the body may not have been read."""
    await send_json(error.body, send, status=error.status, headers={**error.headers, "Connection": "close"})


async def send_json(body: object, send: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Answer with a JSON object that no cache keeps."""
    data = json.dumps(body).encode()
    fields = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Cache-Control": "no-store"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in {**fields, **(headers or {})}.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": data})


def _counted_as(address: str) -> str:
    """What requests from an address are counted under: one machine has a whole /64 of IPv6's to ask from."""
    found = ipaddress.ip_address(address)
    if found.version == 4:
        return address
    return str(found.ipv4_mapped or ipaddress.IPv6Address(int(found) >> 64 << 64))


def _is_address(name: str) -> bool:
    # Rebinding needs a name: no page elsewhere can be at an address of this machine.
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
