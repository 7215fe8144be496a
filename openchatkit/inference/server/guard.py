"""The guard: checks of Host, Origin, rate and token that every request passes before anything else reads it.

A page on the web can make a visitor's browser send requests to this machine, under a name of the page's own that
resolves to 127.0.0.1 (DNS rebinding). So listening on this machine alone is not enough: a request must name one of the
server's hosts, and one that asks for work must come from the server's own page, from no page, or from an allowed
origin. Only allowed origins are sent CORS headers, which let their pages read the answers.
"""

import hmac
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from openchatkit.inference.server.responses import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The least recently seen address is forgotten first; it then starts with a full bucket, as a new one does.
MOST_ADDRESSES = 4096
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
# A name or IPv4 address, or an IPv6 address in brackets; then a port or none.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?", re.IGNORECASE)


class RateLimiter:
    """A token bucket for each address: at most `per_minute` requests a minute, or as many at once after a pause."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        assert per_minute > 0, per_minute
        self._size = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: requests left, and when

    def take(self, address: str) -> float:
        """Take a request out of an address's bucket; return 0, or the seconds until there is one again."""
        now = self._clock()
        left, seen = self._buckets.pop(address, (float(self._size), now))
        left = min(self._size, left + (now - seen) * self._size / 60)
        wait = max(0.0, 1 - left) * 60 / self._size
        self._buckets[address] = (left if wait else left - 1, now)
        if len(self._buckets) > MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        return wait


class Guard:
    """An ASGI application around another. `host` is the address that the server listens on, `names` its other names.

    `origins` are those of other sites' pages that may use it. With a `token`, every path under /v1 needs it as
    `Authorization: Bearer`; `rate` counts requests there, those without the token too.
    """

    def __init__(
        self,
        app: "ASGIApp",
        *,
        host: str,
        names: Collection[str] = (),
        origins: Collection[str] = (),
        token: str | None = None,
        rate: RateLimiter | None = None,
    ) -> None:
        self._app = app
        self._rate = rate
        self._names = {name.lower() for name in (*_LOCAL_NAMES, host, *names)}
        self._origins = frozenset(origins)
        self._any_address = host in ("0.0.0.0", "::")
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on, or answer it with an error."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        added = [*_HEADERS, *self._cors(headers)]

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            self._check_names(scope, headers)
            if self._is_preflight(scope, headers):
                await send_guarded(
                    {"type": "http.response.start", "status": 204, "headers": _preflight_headers(headers)}
                )
                await send_guarded({"type": "http.response.body"})
                return
            if scope["path"].startswith("/v1"):
                self._check_rate(scope["client"])
                self._check_token(headers.get(b"authorization", ""))
        except ApiError as error:
            await error.response()(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _cors(self, headers: Mapping[bytes, str]) -> list[tuple[bytes, bytes]]:
        """Return the headers that let a page of an allowed origin read the answer."""
        if not self._origins:
            return []
        vary = [(b"vary", b"Origin")]
        origin = headers.get(b"origin", "")
        if origin not in self._origins:
            return vary
        exposed = (b"access-control-expose-headers", b"Retry-After, X-Ignored-Fields")
        return [*vary, (b"access-control-allow-origin", origin.encode("latin-1")), exposed]

    def _is_preflight(self, scope: "Scope", headers: Mapping[bytes, str]) -> bool:
        """Whether a browser asks for permission (CORS), without the token, to send an allowed page's request."""
        allowed = headers.get(b"origin", "") in self._origins
        return allowed and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers

    def _check_names(self, scope: "Scope", headers: Mapping[bytes, str]) -> None:
        host = headers.get(b"host", "")
        if not self._is_own_host(host):
            message = f"this server does not go by the Host {host[:100]!r}: --allow-host adds a name"
            raise ApiError(403, message, code="wrong_host")
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._origins and scope["method"] not in ("GET", "HEAD"):
            scheme, _, place = origin.partition("://")
            if scheme not in ("http", "https") or place.lower() != host.lower():
                message = "pages of other origins may not use this server: --allow-origin adds one"
                raise ApiError(403, message, code="wrong_origin")

    def _is_own_host(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = (match[1] or match[2]).lower()
        return name in self._names or (self._any_address and _is_address(name))

    def _check_rate(self, client: tuple[str, int] | None) -> None:
        wait = self._rate.take(_rate_key(client[0]) if client else "") if self._rate else 0
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


def _preflight_headers(headers: Mapping[bytes, str]) -> list[tuple[bytes, bytes]]:
    """Return the headers that let a page send the request it asks about: GET or POST, with any headers."""
    asked = headers.get(b"access-control-request-headers", "")
    answer = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", asked.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]
    if headers.get(b"access-control-request-private-network") == "true":  # a page on the web, a server on its network
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


def _rate_key(address: str) -> str:
    """Return the key under which requests from an address are counted: one machine can use a whole /64 of IPv6."""
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
