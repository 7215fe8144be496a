"""One reply at a time: a queue of bounded length, and the thread that generates.

Torch runs in that thread alone, so the event loop, in another, never waits for it. It should be the thread that loaded
the model: torch keeps a team of threads for each thread that computes, and two teams on the same cores make every step
wait (on two cores a third slower). A job's text waits in the job until its client takes it: a slow reader stops nobody,
and keeps no more in memory than its own reply.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable

from openchatkit.inference.engine.engine import OutOfMemory, is_out_of_memory
from openchatkit.inference.responder import Emit, Reply
from openchatkit.inference.server.errors import ApiError, closing, defect

# Makes a reply: text goes to the first argument as it comes, and the second says when to stop.
Work = Callable[[Emit, Callable[[], bool]], Reply]


class Job:
    """One reply on its way. Made and read in the event loop; the worker's thread fills it.

    When it is `done`, `reply` or `error` says how it ended. Setting `abandoned` ends it within a token.
    """

    def __init__(self, work: Work) -> None:
        self.reply: Reply | None = None
        self.error: ApiError | None = None
        self.done = False
        self.abandoned = False
        self._work = work
        self._text: deque[str] = deque()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._told = False  # whether the loop knows of text that it has not taken yet
        self._over = asyncio.Event()

    async def news(self, timeout: float) -> bool:
        """Wait until there is text to take or the job is done; False after `timeout` seconds without either."""
        return await _happens(self._news, timeout)

    async def over(self, timeout: float) -> bool:
        """Wait until the job is done; False if it is not after `timeout` seconds."""
        return await _happens(self._over, timeout)

    def take(self) -> str:
        """The text that has come since the last time."""
        self._news.clear()
        self._told = False  # before the text is taken: what comes later is told of again
        pieces = []
        while self._text:
            pieces.append(self._text.popleft())
        if self.done:
            self._news.set()  # stays true
        return "".join(pieces)

    def run(self, stopping: Callable[[], bool]) -> None:
        """Do the work, in the calling thread."""
        try:
            self.reply = self._work(self._emit, lambda: self.abandoned or stopping())
            if self.reply.finish == "interrupted":
                self.error = closing()
        except ApiError as error:
            self.error = error
        except Exception as error:  # a client must get an answer, and the worker live on, whatever it was
            self.error = _translate(error)
        self.finish()

    def finish(self) -> None:
        """Say that no more comes."""
        self.done = True
        self._tell(self._news)
        self._tell(self._over)

    def _emit(self, text: str) -> None:
        self._text.append(text)
        if not self._told:
            self._told = True
            self._tell(self._news)

    def _tell(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(event.set)


class Worker:
    """Runs jobs in their order, one at a time; at most `max_waiting` wait. `stopping` turns true when all must end.

    Who wants replies calls `submit` and `drop` from any thread; `run` does the jobs in the thread that calls it.
    """

    def __init__(self, *, max_waiting: int, stopping: Callable[[], bool] = lambda: False) -> None:
        self._max_waiting = max_waiting
        self._stopping = stopping
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._ended = False

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job is being done."""
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError 429 when the queue is full, 503 when the server stops."""
        with self._changed:
            if self._ending():
                raise closing()
            if self.waiting + self.busy > self._max_waiting:
                message = f"{self.waiting} requests are waiting already: try again later"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": "5"})
            self._waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Nobody waits for this job any more: it leaves the queue at once, or ends within a token."""
        job.abandoned = True
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def run(self) -> None:
        """Do jobs as they come, until `stop`."""
        while (job := self._next()) is not None:
            if self._ending():
                job.error = closing()
                job.finish()
            elif not job.abandoned:
                job.run(self._ending)
            with self._changed:
                self._running = None

    def stop(self) -> None:
        """Let `run` return when the jobs that wait have ended, at once; no more are taken."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _ending(self) -> bool:
        return self._ended or self._stopping()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running


async def _happens(event: asyncio.Event, timeout: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except asyncio.TimeoutError:
        return False
    return True


def _translate(error: Exception) -> ApiError:
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        message = "out of memory: send a shorter conversation or ask for fewer max_tokens"
        return ApiError(503, message, code="out_of_memory")
    return defect(error)  # the request itself was checked before: what is left is this server's to mend
