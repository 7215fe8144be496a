"""Rank 0's side of the watchdog: it hears every rank's beats, answers them, and sends all what the judge finds.

A message is a line of JSON. Nobody is heard who does not know the password, which the ranks have from their process
group. Runs in the event loop of `distributed.watchdog`, in its thread.
"""

import asyncio
import contextlib
import hmac
import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from openchatkit.distributed.activity import Position
from openchatkit.distributed.judge import Judge

Message = dict[str, Any]

_LEAVE_SECONDS = 5.0  # that rank 0 waits for the others at the end of a run


class BeatServer:
    """The connections of all ranks, and the judge that hears them. `names` describe ranks; they know the `token`."""

    def __init__(
        self, listener: socket.socket, names: Sequence[str], token: str, silence: float, beat_seconds: float
    ) -> None:
        self._listener, self._names, self._token, self._beat_seconds = listener, names, token, beat_seconds
        self._judge = Judge(names, silence, time.monotonic())
        self._writers: list[asyncio.StreamWriter] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._published = False

    async def open(self) -> None:
        """Listen, and look at the clock from time to time."""
        self._server = await asyncio.start_server(self._serve, sock=self._listener)
        self._ticking = asyncio.ensure_future(self._tick())

    async def close(self) -> None:
        """Wait for the others to leave, for a while, and release those that stay."""
        end = time.monotonic() + _LEAVE_SECONDS
        while not self._judge.all_left and time.monotonic() < end:
            await asyncio.sleep(self._beat_seconds / 10)
        for writer in self._writers:
            send(writer, {"over": True})
            writer.close()
        self._ticking.cancel()
        self._server.close()
        if self._serving:
            await asyncio.wait(self._serving, timeout=1)

    async def _tick(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(self._beat_seconds)
            now = time.monotonic()
            if now - before > 2 * self._beat_seconds + 1:
                self._judge.forgive(now - before)  # This process itself was frozen; beats may be waiting.
            before = now
            self._publish()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        rank = await self._admit(reader)
        if rank is None:
            writer.close()
            return
        self._writers.append(writer)
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self._take(rank, json.loads(line), writer)
                self._publish()
        writer.close()
        self._judge.note_disconnection(rank)
        self._publish()

    async def _admit(self, reader: asyncio.StreamReader) -> int | None:
        """Return the rank on the other side, None where it does not know the password."""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10))
            token, rank = str(hello["token"]).encode(), int(hello["rank"])
        except (OSError, ValueError, OverflowError, KeyError, TypeError, asyncio.TimeoutError):
            return None
        known = hmac.compare_digest(token, self._token.encode())
        return rank if known and 0 <= rank < len(self._names) else None

    def _take(self, rank: int, message: Message, writer: asyncio.StreamWriter) -> None:
        now = time.monotonic()
        if "position" in message:
            self._judge.hear(rank, Position.from_json(message["position"], now), now)
            send(writer, {"position": self._judge.position(0).to_json(now)})
        elif "lost" in message:
            self._judge.note_loss(rank, message["lost"], now, timed_out=message["timed_out"])
        elif "failed" in message:
            self._judge.note_failure(rank, message["failed"], message["status"], now)
            self._publish()
            send(writer, {"noted": True})
        elif "left" in message:
            self._judge.note_leaving(rank)

    def _publish(self) -> None:
        verdict = self._judge.decide(time.monotonic())
        if verdict is not None and not self._published:
            self._published = True
            for writer in self._writers:
                send(writer, {"verdict": {"message": verdict.message, "status": verdict.status}})


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a line. To a rank that does not read, what is sent waits in memory, until it is given up."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")
