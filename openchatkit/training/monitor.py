"""The live page of a run, `--monitor`: rank 0 serves its pictures while it runs, from a thread, to its own machine.

It only ever reads; a page that cannot be served is no reason to end a run.
"""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from openchatkit import web
from openchatkit.errors import UserError
from openchatkit.formats import metrics, trace
from openchatkit.training.curve_names import Row
from openchatkit.training.forecast import Forecast, format_left
from openchatkit.training.run_curves import RunCurves, read_timeline, render_page

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

_CLOSING_SECONDS = 5


def check_address(address: str) -> None:
    """Raise UserError where the packages of a server are missing, or another program listens at this address."""
    web.check_installed("--monitor")
    _listen(address).close()


class Monitor:
    """A sink whose numbers a page shows; rows of metrics.jsonl in `folder` from before are the start of its curves.

    The timeline is that of the folder's trace, once there is one.
    """

    def __init__(self, address: str, folder: Path, *, total_steps: int) -> None:
        import uvicorn

        self._folder = folder
        self._curves = RunCurves(folder.resolve().name, total_steps)
        for row in metrics.read(folder):
            self._curves.add(row)
        self._forecast = Forecast(total_steps)
        self._lock = threading.Lock()
        self._timeline: tuple[int, dict[str, Any] | None] = (0, None)
        listener = _listen(address)
        self._server = uvicorn.Server(web.settings(create_app(self.collect), connections=50))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="monitor", daemon=True
        )
        self._thread.start()
        logger.info("{} shows this run", web.address_of(listener))

    def add_step(self, row: Row) -> None:
        with self._lock:
            self._forecast.count(row["step"])
            self._curves.add(row)

    def add_evaluation(self, row: Row) -> None:
        with self._lock:
            self._curves.add(row)

    def close(self) -> None:
        """Stop serving; open pages keep what they show."""
        self._server.should_exit = True
        self._thread.join(_CLOSING_SECONDS)

    def collect(self) -> dict[str, Any]:
        """Return what the page draws now."""
        with self._lock:
            curves, left = self._curves.to_json(), self._forecast.seconds_left
        if left is not None:
            curves["last"] = curves["last"] | {"left": format_left(left)}
        return {"runs": [curves], "timeline": self._read_timeline()}

    def _read_timeline(self) -> dict[str, Any] | None:
        path = self._folder / trace.TRACE
        try:
            written = path.stat().st_mtime_ns
            if written != self._timeline[0]:
                self._timeline = written, read_timeline(path)
        except (OSError, UserError):  # none yet, or a file of that name that is no trace
            return None
        return self._timeline[1]


def create_app(collect: Callable[[], dict[str, Any]]) -> "ASGIApp":
    """Return the application: the page, and the data that it asks for."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    page = render_page(None).encode()
    headers = web.page_headers(page)

    def answer(request: "Request") -> "Response":
        # A page of another site may have been given a name that leads here; it must not read the answer.
        if not web.is_loopback(request.url.hostname or ""):
            return PlainTextResponse("this page is for 127.0.0.1 and localhost alone\n", status_code=403)
        if request.url.path == "/data":
            return JSONResponse(collect(), headers={"Cache-Control": "no-store"})
        return Response(page, media_type="text/html", headers=headers)

    return Starlette(routes=[Route("/", answer), Route("/data", answer)])


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    flags, advice = f"--monitor {address}", "give another port"
    listener = web.bind(host.strip("[]"), int(port), flags=flags, advice=advice)
    try:
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"{flags} cannot be listened on: {error.strerror}; {advice}") from error
    return listener
