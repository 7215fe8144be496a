"""A thread in each rank that ends the run on all ranks when one of them dies, freezes or is cut off, and names it.

Each rank sends its position (`distributed.activity`) to rank 0 every second over a connection of its own, and rank 0
answers. A rank that is not heard for `silence` seconds is frozen or cut off, whatever its main thread was at: beats
go on while that computes, compiles, loads or saves. A connection that ends without a word means that a process died.
Rank 0 makes the verdict (`distributed.judge`) and sends it to all; a rank whose beats are not answered makes its own.

After a verdict, a rank's main thread is given a moment to fail by itself, as it does when gloo loses a peer. One that
waits for a GPU cannot, so the thread then prints the verdict and ends the process. The same connection carries why a
rank fails, so that all ranks end with its status and its words.
"""

import asyncio
import contextlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from openchatkit.cli import one_line
from openchatkit.distributed import network
from openchatkit.distributed.activity import Position
from openchatkit.distributed.beat_server import BeatServer, Message, send
from openchatkit.distributed.judge import RunVerdict, describe_death, describe_silence
from openchatkit.distributed.layout import Layout
from openchatkit.distributed.processes import note_verdict
from openchatkit.errors import DEFECT, RESUMABLE, Interrupted, UserError

# NCCL ends a process after its own timeout without a word: give its groups this much more than `--timeout`.
MARGIN_SECONDS = 10.0

_BEAT_SECONDS = 1.0
_GRACE_SECONDS = 1.0  # for the main thread to notice by itself what the verdict says
_NOTED_SECONDS = 2.0  # for rank 0 to take note of a rank's end
_END_SECONDS = 5.0  # for the main thread to end after an error
_MOST_CHARACTERS = 4000  # of a message; a line that is longer than asyncio's limit is an error
_VERDICT_SECONDS = 4.0  # within which rank 0 finds out why a rank has lost another


class LostPeer(Interrupted):
    """Another rank did not answer, for a reason in torch's words.

    `timed_out`: it was waited for in vain; otherwise its connection broke.
    """

    def __init__(self, message: str, *, reason: str, timed_out: bool) -> None:
        super().__init__(message)
        self.reason, self.timed_out = reason, timed_out


class PeerEnded(UserError):
    """The end of a run by another rank's fault, with the exit status that all ranks end with."""

    def __init__(self, verdict: RunVerdict) -> None:
        super().__init__(verdict.message)
        self.exit_status = verdict.status


@contextlib.contextmanager
def watch(layout: Layout, *, host: str | None, silence: float, timeout: float, advice: str = "") -> Iterator[None]:
    """Watch all ranks during the block. Collective; a run of one rank needs no watchdog.

    `host`: address of rank 0, which listens there alone; None: the one that torchrun names. `timeout`: seconds that a
    rank may wait for others, which count on GPUs alone, since elsewhere the wait itself raises. `advice` follows a
    verdict of status 75. A LostPeer in the block becomes a PeerEnded that says what happened to whom; any other
    exception ends the other ranks, with its status and message.
    """
    if layout.control is None:
        yield
        return
    listener = network.listen(host, 0) if layout.rank == 0 else None
    token, port = (secrets.token_hex(16), listener.getsockname()[1]) if listener else ("", 0)
    entries = layout.gather((layout.describe(socket.gethostname()), token, port))
    address = host or (os.environ["MASTER_ADDR"] if layout.rank else "localhost")
    meeting = _Meeting([name for name, _, _ in entries], address, port=entries[0][2], token=entries[0][1])
    dog = _Watchdog(layout, meeting, listener, silence=silence, timeout=timeout, advice=advice)
    try:
        layout.together(dog.start)
        yield
    except LostPeer as error:
        verdict = dog.ask(error.reason, timed_out=error.timed_out)
        if verdict is None:
            raise
        raise PeerEnded(verdict) from error
    except UserError as error:
        dog.report_failure(str(error), error.exit_status)
        raise
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        kind = "was interrupted" if stopped else f"failed ({type(error).__name__}: {one_line(error)[:200]})"
        dog.report_failure(kind, RESUMABLE if stopped else DEFECT)
        raise
    else:
        dog.leave()


@dataclass(frozen=True)
class _Meeting:
    """Where the beats go, the password, and each rank in words."""

    names: list[str]
    host: str
    port: int
    token: str


class _Watchdog:
    """The thread of one rank; with a `listener`, also rank 0's side. Methods without an underscore are the main
    thread's, coroutines are the thread's own.
    """

    def __init__(
        self,
        layout: Layout,
        meeting: _Meeting,
        listener: socket.socket | None,
        *,
        silence: float,
        timeout: float,
        advice: str,
    ) -> None:
        self._layout, self._meeting, self._advice = layout, meeting, advice
        self._silence = silence
        self._patience = timeout if layout.device.type == "cuda" else None
        self._beat_seconds = min(_BEAT_SECONDS, silence / 5)
        self._server: BeatServer | None = None
        if listener is not None:
            self._server = BeatServer(listener, meeting.names, meeting.token, silence, self._beat_seconds)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._connected = threading.Event()
        self._problem: Exception | None = None
        self._decided = threading.Event()  # with self._verdict
        self._noted = threading.Event()  # rank 0 has taken note of this rank's end
        self._verdict: RunVerdict | None = None
        self._failing_since: float | None = None
        self._over = False
        self._writer: asyncio.StreamWriter | None = None

    def start(self) -> None:
        """Start the thread; UserError when it cannot reach rank 0."""
        self._thread.start()
        if not self._connected.wait(self._silence + 1) or self._problem is not None:
            reason = self._problem or "no answer"
            raise UserError(
                f"{self._meeting.names[self._layout.rank]} does not reach rank 0's watchdog at {self._meeting.host}:"
                f"{self._meeting.port} ({reason}): ranks must reach each other at all ports, as gloo and NCCL need it"
            )

    def leave(self) -> None:
        """Leave in good order, at the end of a run."""
        self._loop.call_soon_threadsafe(self._leave)
        self._thread.join()

    def report_failure(self, words: str, status: int) -> None:
        """Let the other ranks end with this one's status and message; the thread sees to it that this one ends."""
        self._failing_since = time.monotonic()
        self._send_from_main({"failed": words[:_MOST_CHARACTERS], "status": status})
        self._noted.wait(_NOTED_SECONDS)

    def ask(self, reason: str, *, timed_out: bool) -> RunVerdict | None:
        """Return why another rank does not answer, None if nobody knows."""
        self._failing_since = time.monotonic() + _VERDICT_SECONDS
        self._send_from_main({"lost": reason, "timed_out": timed_out})
        self._decided.wait(_VERDICT_SECONDS)
        return self._verdict

    def _send_from_main(self, message: Message) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(self._send, message)

    def _run(self) -> None:
        try:
            asyncio.run(self._beat())
        except (OSError, asyncio.TimeoutError) as error:
            self._problem = error
        finally:
            self._connected.set()

    async def _beat(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leaving = asyncio.Event()
        if self._server is not None:
            await self._server.open()
        meeting = self._meeting
        reader, writer = await asyncio.wait_for(asyncio.open_connection(meeting.host, meeting.port), self._silence)
        self._writer = writer
        self._send({"rank": self._layout.rank, "token": meeting.token})
        listening = asyncio.ensure_future(self._listen(reader))
        before = self._answered = time.monotonic()
        self._position_of_0 = self._layout.activity.now
        self._connected.set()
        while not self._leaving.is_set():
            now = time.monotonic()
            if now - before > 2 * self._beat_seconds + 1:
                self._answered += now - before  # This process itself was frozen; answers may be waiting.
            before = now
            self._send({"position": self._layout.activity.now.to_json(now)})
            self._check(now)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), self._beat_seconds)
        self._send({"left": True})
        if self._server is not None:
            await self._server.close()
        listening.cancel()
        writer.close()

    def _check(self, now: float) -> None:
        """Look whether this rank has waited too long for an answer of rank 0, or on a GPU for another rank."""
        if self._verdict is None and not self._over and now - self._answered > self._silence:
            name = self._meeting.names[0]
            self._decide(RunVerdict(describe_silence(name, self._position_of_0, self._silence), RESUMABLE))
        position = self._layout.activity.now
        if self._patience is not None and position.waits and now - position.since > self._patience:
            self._send({"lost": f"{self._patience:.0f} s", "timed_out": True})

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Take rank 0's answers, until its process ends."""
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self._answered = time.monotonic()
                message = json.loads(line)
                if "position" in message:
                    self._position_of_0 = Position.from_json(message["position"], self._answered)
                elif "verdict" in message:
                    self._decide(RunVerdict(**message["verdict"]))
                elif "noted" in message:
                    self._noted.set()
                elif "over" in message:
                    self._over = True
        if not self._over and not self._leaving.is_set():
            self._decide(RunVerdict(describe_death(self._meeting.names[0], self._position_of_0), RESUMABLE))

    def _decide(self, verdict: RunVerdict) -> None:
        if self._verdict is None:
            message = verdict.message + (self._advice if verdict.status == RESUMABLE else "")
            self._verdict = RunVerdict(message, verdict.status)
            note_verdict(message)
            self._decided.set()
            self._loop.call_later(_GRACE_SECONDS, self._end)

    def _end(self) -> None:
        """End the process, unless its main thread is about to, for which it has a while."""
        assert self._verdict is not None
        seconds = 0.0 if self._failing_since is None else self._failing_since + _END_SECONDS - time.monotonic()
        if seconds > 0:
            self._loop.call_later(seconds, self._end)
        elif not self._leaving.is_set():
            end_process(self._verdict)

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            send(self._writer, message)

    def _leave(self) -> None:
        self._leaving.set()


def describe_short_timeout(timeout: float, step_seconds: float) -> str | None:
    """Return a warning where a step takes longer than a rank waits for another, else None."""
    if step_seconds <= timeout:
        return None
    return (
        f"--timeout {timeout:g}: a step took {step_seconds:.1f} s, so a rank that waits for a slow one may give it up; "
        f"give at least {math.ceil(3 * step_seconds)}"
    )


def end_process(verdict: RunVerdict) -> None:
    """Print a verdict and end this process, whatever its main thread waits for."""
    clear = "\r\033[K" if os.isatty(2) else ""
    # Not through sys.stderr: the main thread may hold its lock.
    os.write(2, f"{clear}error: {one_line(verdict.message)}\n".encode(errors="backslashreplace"))
    os._exit(verdict.status)
