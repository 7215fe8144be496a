"""Getting a job's reply to its client: whole, or as server-sent events, for as long as the client is there."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from openchatkit.inference.server.answers import Answer
from openchatkit.inference.server.errors import ApiError
from openchatkit.inference.server.guard import send_error, send_json
from openchatkit.inference.server.worker import Job, Worker

# A comment so often keeps a connection that proxies would take for dead.
HEARTBEAT_SECONDS = 5.0
# Text is sent at most so often: each piece costs the event loop and the client some of the processor that makes tokens.
PACE_SECONDS = 0.05
# For a client to take what it is sent, after the request's own time is over.
GRACE_SECONDS = 10.0

_EVENTS = {
    b"content-type": b"text/event-stream; charset=utf-8",
    b"cache-control": b"no-store",
    b"x-accel-buffering": b"no",
}


class Delivery:
    """An ASGI response: one job's answer, with some `headers`.

    A client that hangs up, or that `timeout` seconds are over, ends the job.
    """

    def __init__(
        self,
        job: Job,
        worker: Worker,
        answer: Answer,
        *,
        stream: bool,
        timeout: float,
        heartbeat: float = HEARTBEAT_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._job = job
        self._worker = worker
        self._answer = answer
        self._stream = stream
        self._ends = time.monotonic() + timeout
        self._heartbeat = heartbeat
        self._headers = dict(headers or {})

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Send the answer, or stop when nobody reads it."""
        hang_up = asyncio.create_task(_hang_up(receive))
        sending = asyncio.create_task(self._send_events(send) if self._stream else self._send_whole(send))
        tasks = (hang_up, sending)
        try:
            limit = max(0.0, self._ends - time.monotonic()) + GRACE_SECONDS
            await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._worker.drop(self._job)
            for task in tasks:
                task.cancel()
            # What went wrong in sending is the defect that it is; having been cancelled here is none.
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send_whole(self, send: Any) -> None:
        try:
            if not await self._job.over(self._left()):
                raise _timeout()
            reply = self._reply()
        except ApiError as error:
            await send_error(error, send)
        else:
            await send_json(self._answer.whole(reply), send, headers=self._headers)

    async def _send_events(self, send: Any) -> None:
        # Until the first text or the first heartbeat, an error can still have a status of its own.
        try:
            if await self._news(self._heartbeat) and self._job.done:
                self._reply()
        except ApiError as error:
            await send_error(error, send)
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": [*_EVENTS.items(), *headers]})
        for chunk in self._answer.opening():
            await _event(send, chunk)
        try:
            await self._send_text(send)
        except ApiError as error:
            await _event(send, error.body)
        else:
            await _send(send, "data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})

    async def _send_text(self, send: Any) -> None:
        sent = ""
        while True:
            done = self._job.done  # before the text is taken: what is done adds none
            if text := self._job.take():
                sent += text
                await _event(send, self._answer.piece(text))
                if not done:
                    await self._job.over(min(PACE_SECONDS, self._left()))
            if done:
                break
            if not await self._news(self._heartbeat):
                await _send(send, ": waiting\n\n")
        reply = self._reply()
        # A moderator's words may come with the reply and not as text before it.
        if reply.text.startswith(sent) and (rest := reply.text[len(sent) :]):
            await _event(send, self._answer.piece(rest))
        for chunk in self._answer.closing(reply):
            await _event(send, chunk)

    async def _news(self, timeout: float) -> bool:
        """Whether there was news within `timeout` seconds; ApiError 504 when the request's time is over."""
        news = await self._job.news(min(timeout, self._left()))
        if not news and self._left() == 0:
            raise _timeout()
        return news

    def _left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def _reply(self) -> Any:
        if self._job.error is not None:
            raise self._job.error
        return self._job.reply


def _timeout() -> ApiError:
    return ApiError(504, "the reply took too long, and was given up", code="timeout")


async def _hang_up(receive: Any) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _event(send: Any, body: object) -> None:
    await _send(send, f"data: {json.dumps(body)}\n\n")


async def _send(send: Any, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
