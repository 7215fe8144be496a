"""What is internal to uvicorn: its HTTP protocol, extended by an end to waiting for clients that do nothing.

Between two requests a client may do nothing for as long as uvicorn is told; see `KEEP_ALIVE`.
uvicorn waits for a request's head as long as it takes, and as long for a client to read the end of an answer, and it
serves so many connections and no more. So a few hundred silent ones would keep everybody else out.
"""

from typing import Any

PATIENCE = 15.0  # seconds
# Between the requests on a connection, in seconds: longer than the minute for which common clients and proxies take it
# to be open, so that they close it, and send no request on one that the server has just closed.
KEEP_ALIVE = 75
# What the extension below overrides or reads.
_METHODS = ("connection_made", "connection_lost", "on_response_complete")


def protocol(patience: float = PATIENCE) -> "type | str":
    """Return uvicorn's HTTP protocol, made to cut connections that no request or answer is on its way on.

    That is when a request's head does not come, or not whole, or an answer that is whole, or was given up, is not
    taken: for `patience` seconds at least, and at most for twice as long. Where uvicorn has no such protocol any more,
    it is the name of the one that it has, which waits for silent clients.
    """
    try:
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError:
        return "auto"
    if not all(hasattr(H11Protocol, name) for name in _METHODS):
        return "auto"

    class Connection(H11Protocol):
        _answers = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch(None)

        def connection_lost(self, error: Exception | None) -> None:
            self._next_look.cancel()
            super().connection_lost(error)

        def on_response_complete(self) -> None:
            self._answers += 1
            super().on_response_complete()

        def _watch(self, idle_since: int | None) -> None:
            """Look again and again; `idle_since` counts the answers at the last look, if there was nothing to do."""
            busy = self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()
            # Between two requests uvicorn's own timer runs; then nothing of the answer, or of the next, is on its way.
            between = getattr(self, "timeout_keep_alive_task", None) is not None
            on_its_way = self.transport.get_write_buffer_size() or self.conn.trailing_data[0]
            busy = busy or (between and not on_its_way)
            if not busy and idle_since == self._answers:
                self.transport.abort()
                return
            self._next_look = self.loop.call_later(patience, self._watch, None if busy else self._answers)

    return Connection
