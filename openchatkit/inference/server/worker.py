"""A bounded queue of replies, and the one thread that generates them, one at a time.

Torch runs in that thread alone, so the event loop, in another, never waits for it. It should be the thread that loaded
the model: torch keeps a team of threads for each thread that computes, and two teams on the same cores slow each other
down (by a third on two cores). A job keeps its text until its client takes it: a slow reader stops nobody, and keeps no
more in memory than its own reply.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from openchatkit.inference.engine.engine import OutOfMemory, is_out_of_memory
from openchatkit.inference.responder import Emit, Reply
from openchatkit.inference.server.responses import ApiError, internal_error, shutting_down

# Makes a reply: the first argument takes its text as it comes, the second says when to stop.
_MakeReply = Callable[[Emit, Callable[[], bool]], Reply]


class ReplyJob:
    """One reply, queued or in progress. Made and read in the event loop; filled by the worker's thread.

    When it is `done`, it has a `reply` or an `error`. Setting `abandoned` ends it within a token.
    """

    def __init__(self, make_reply: _MakeReply) -> None:
        self.reply: Reply | None = None
        self.error: ApiError | None = None
        self.done = False
        self.abandoned = False
        self._make_reply = make_reply
        self._text: deque[str] = deque()
        self._loop = asyncio.get_running_loop()
        self._has_text = asyncio.Event()
        self._notified = False  # whether the loop knows of text that it has not taken yet
        self._is_done = asyncio.Event()

    async def wait_for_text(self, timeout: float) -> bool:
        """Wait until there is text to take or the job is done; False after `timeout` seconds without either."""
        return await _wait(self._has_text, timeout)

    async def wait_until_done(self, timeout: float) -> bool:
        """Wait until the job is done; False if it is not after `timeout` seconds."""
        return await _wait(self._is_done, timeout)

    def take_text(self) -> str:
        """Return the text that has come since the last call."""
        self._has_text.clear()
        self._notified = False  # before the text is taken: later text notifies again
        pieces = []
        while self._text:
            pieces.append(self._text.popleft())
        if self.done:
            self._has_text.set()  # stays true
        return "".join(pieces)

    def run(self, stopping: Callable[[], bool]) -> None:
        """Make the reply, in the calling thread."""
        try:
            self.reply = self._make_reply(self.emit, lambda: self.abandoned or stopping())
            if self.reply.finish == "interrupted":
                self.error = shutting_down()
        except ApiError as error:
            self.error = error
        except Exception as error:  # whatever it was, the client needs an answer and the worker goes on
            self.error = _api_error(error)
        self.finish()

    def finish(self) -> None:
        """Mark the job as done."""
        self.done = True
        self._set(self._has_text)
        self._set(self._is_done)

    def emit(self, text: str) -> None:
        """Add text of the reply; called in the worker's thread."""
        self._text.append(text)
        if not self._notified:
            self._notified = True
            self._set(self._has_text)

    def _set(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody waits
            self._loop.call_soon_threadsafe(event.set)


class Worker:
    """Runs jobs in their order, one at a time; at most `max_waiting` wait. `stopping` becomes true when all must end.

    `submit` and `drop` may be called from any thread; `run` does the jobs in the thread that calls it.
    """

    def __init__(self, *, max_waiting: int, stopping: Callable[[], bool] = lambda: False) -> None:
        self._max_waiting = max_waiting
        self._stopping = stopping
        self._waiting: deque[ReplyJob] = deque()
        self._running: ReplyJob | None = None
        self._changed = threading.Condition()
        self._ended = False

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for their turn."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._running is not None

    def submit(self, job: ReplyJob) -> None:
        """Queue a job; ApiError 429 when the queue is full, 503 when the server stops."""
        with self._changed:
            if self._is_ending():
                raise shutting_down()
            if self.waiting + self.busy > self._max_waiting:
                message = f"{self.waiting} requests are waiting already: try again later"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": "5"})
            self._waiting.append(job)
            self._changed.notify()

    def drop(self, job: ReplyJob) -> None:
        """Take a job that nobody waits for out of the queue at once, or end it within a token."""
        job.abandoned = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def run(self) -> None:
        """Run jobs as they come, until `stop`."""
        while (job := self._next()) is not None:
            if self._is_ending():
                job.error = shutting_down()
                job.finish()
            elif not job.abandoned:
                job.run(self._is_ending)
            with self._changed:
                self._running = None

    def stop(self) -> None:
        """End all jobs at once, take no more, and let `run` return."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _is_ending(self) -> bool:
        return self._ended or self._stopping()

    def _next(self) -> ReplyJob | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running


async def _wait(event: asyncio.Event, timeout: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except asyncio.TimeoutError:
        return False
    return True


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        message = "out of memory: send a shorter conversation or ask for fewer max_tokens"
        return ApiError(503, message, code="out_of_memory")
    return internal_error(error)  # the request was checked before, so this is the server's fault
