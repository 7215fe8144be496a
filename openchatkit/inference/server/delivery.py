"""Delivery of a job's reply to its client: whole, or as server-sent events, for as long as the client is there."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from openchatkit.inference.responder import Reply
from openchatkit.inference.server.responses import ApiError, Completion, json_response
from openchatkit.inference.server.worker import ReplyJob, Worker

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

# Seconds between comments, without which proxies take a silent connection for dead.
HEARTBEAT_SECONDS = 5.0
# Seconds between pieces of text: sending one takes processor time from the event loop, the client and the model.
PACE_SECONDS = 0.05
# For a client to read what it is sent, after the request's own time is over.
GRACE_SECONDS = 10.0

_EVENTS = {
    b"content-type": b"text/event-stream; charset=utf-8",
    b"cache-control": b"no-store",
    b"x-accel-buffering": b"no",
}


class Delivery:
    """An ASGI response: one job's reply, with some `headers`.

    The job ends when its client hangs up, or after `timeout` seconds.
    """

    def __init__(
        self,
        job: ReplyJob,
        worker: Worker,
        completion: Completion,
        *,
        stream: bool,
        timeout: float,
        heartbeat: float = HEARTBEAT_SECONDS,
        pace: float = PACE_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._job = job
        self._worker = worker
        self._completion = completion
        self._stream = stream
        self._deadline = time.monotonic() + timeout
        self._heartbeat = heartbeat
        self._pace = pace
        self._headers = dict(headers or {})

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Send the reply, or stop when nobody reads it."""
        hang_up = asyncio.create_task(_wait_for_hang_up(receive))
        sending = asyncio.create_task(self._send(scope, receive, send))
        tasks = (hang_up, sending)
        try:
            limit = self._time_left() + GRACE_SECONDS
            await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._worker.drop(self._job)
            for task in tasks:
                task.cancel()
            # An error in sending is a defect and is raised; a cancellation comes from the lines above.
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        # Until the first text or the first heartbeat, an error can still have a status of its own.
        try:
            if self._stream:
                if await self._wait_for_text() and self._job.done:
                    self._reply()
                await self._send_events(send)
                return
            response = await self._whole()
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _whole(self) -> "Response":
        if not await self._job.wait_until_done(self._time_left()):
            raise _timeout()
        return json_response(self._completion.whole(self._reply()), headers=self._headers)

    async def _send_events(self, send: "Send") -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": [*_EVENTS.items(), *headers]})
        for chunk in self._completion.first_chunks():
            await _send_event(send, chunk)
        try:
            await self._send_text(send)
        except ApiError as error:
            await _send_event(send, error.body)
        else:
            await _send_line(send, "data: [DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _send_text(self, send: "Send") -> None:
        sent = ""
        while True:
            done = self._job.done  # before the text is taken: a job that is done adds none
            if text := self._job.take_text():
                sent += text
                await _send_event(send, self._completion.chunk(text))
                if not done:
                    await self._job.wait_until_done(min(self._pace, self._time_left()))
            if done:
                break
            if not await self._wait_for_text():
                await _send_line(send, ": waiting")
        reply = self._reply()
        # A moderator's message may come with the reply and not as text before it.
        if reply.text.startswith(sent) and (rest := reply.text[len(sent) :]):
            await _send_event(send, self._completion.chunk(rest))
        for chunk in self._completion.last_chunks(reply):
            await _send_event(send, chunk)

    async def _wait_for_text(self) -> bool:
        """Wait for text or the reply's end, at most until the next heartbeat; ApiError 504 when the time is over."""
        came = await self._job.wait_for_text(min(self._heartbeat, self._time_left()))
        if not came and self._time_left() == 0:
            raise _timeout()
        return came

    def _time_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _reply(self) -> Reply:
        if self._job.error is not None:
            raise self._job.error
        assert self._job.reply is not None, "a job that is done has a reply or an error"
        return self._job.reply


def _timeout() -> ApiError:
    return ApiError(504, "the reply took too long and was stopped", code="timeout")


async def _wait_for_hang_up(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: "Send", body: object) -> None:
    await _send_line(send, f"data: {json.dumps(body)}")


async def _send_line(send: "Send", line: str) -> None:
    await send({"type": "http.response.body", "body": f"{line}\n\n".encode(), "more_body": True})
