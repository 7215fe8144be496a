"""Private parts of uvicorn: its HTTP protocol, extended by a timeout for silent clients.

uvicorn limits only the pause between two requests (`timeout_keep_alive`). It waits without limit for a request's head,
and for a client to read the end of a response. Since it accepts a limited number of connections, a few hundred silent
clients would lock out all others. No public setting of uvicorn (0.54) prevents that, and an ASGI application or a
middleware of starlette sees no connection before the head has arrived. `Config(http=...)` takes a protocol class, but
only uvicorn's own knows where a request and its response end; hence the subclass.
"""

from typing import Any

PATIENCE = 15.0  # seconds
# Seconds between two requests on a connection: longer than the minute after which common clients and proxies close it,
# so that they never send a request on a connection that the server has just closed.
KEEP_ALIVE = 75
# Methods that the subclass below extends.
_METHODS = ("connection_made", "connection_lost", "on_response_complete")


def protocol(patience: float = PATIENCE) -> "type | str":
    """Return uvicorn's HTTP protocol, extended to cut connections on which nothing is under way.

    That is when a request's head does not arrive in full, or a finished or abandoned response is not read, for
    `patience` seconds at least and twice as long at most. If uvicorn has no such protocol any more, return "auto", its
    own choice, which waits for silent clients.
    """
    try:
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError:
        return "auto"
    if not all(hasattr(H11Protocol, name) for name in _METHODS):
        return "auto"

    class Connection(H11Protocol):
        _responses = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch(None)

        def connection_lost(self, error: Exception | None) -> None:
            self._next_check.cancel()
            super().connection_lost(error)

        def on_response_complete(self) -> None:
            self._responses += 1
            super().on_response_complete()

        def _watch(self, idle_since: int | None) -> None:
            """Check every `patience` seconds; `idle_since` counts the responses at the last check if it was idle."""
            busy = self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()
            # Between two requests uvicorn's own timer runs, unless a response or the next request is under way.
            between = getattr(self, "timeout_keep_alive_task", None) is not None
            under_way = self.transport.get_write_buffer_size() or self.conn.trailing_data[0]
            busy = busy or (between and not under_way)
            if not busy and idle_since == self._responses:
                self.transport.abort()
                return
            self._next_check = self.loop.call_later(patience, self._watch, None if busy else self._responses)

    return Connection
