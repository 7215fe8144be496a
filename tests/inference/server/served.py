"""A server on this machine as a test sees it, and requests byte by byte."""

import json
import socket
import threading
from dataclasses import dataclass

import openai

from openchatkit.inference.moderation.moderator import Verdict
from openchatkit.inference.responder import Responder
from openchatkit.inference.server.worker import Worker

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Running:
    """A server that answers: its address, its port, its worker and its responder."""

    address: str
    port: int
    worker: Worker
    responder: Responder
    token: str | None

    def client(self, token: str | None = None) -> openai.OpenAI:
        """The official client of this server, which tries everything once."""
        key = token or self.token or "none"
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def send(self, request: bytes) -> bytes:
        """What the server says to these bytes until it closes the connection."""
        with self.connect(request) as connection:
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def connect(self, request: bytes) -> socket.socket:
        """An open connection on which these bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request)
        return connection

    def ask(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, object]]:
        """Status and JSON of a POST."""
        return parsed(self.send(post(path, body, **headers)))


class Refusing:
    """A moderator that refuses what holds a word."""

    MESSAGE = "That is not for here."

    def __init__(self, word: str) -> None:
        self._word = word

    def check(self, question: str, answer: str | None = None) -> Verdict:
        allowed = self._word not in (question if answer is None else answer)
        return Verdict(allowed, message="" if allowed else self.MESSAGE)


def post(path: str, body: object, **headers: str) -> bytes:
    """The bytes of a POST of JSON (or of bytes as they are); underscores in header names stand for hyphens."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= {"Connection": "close", **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def parsed(answer: bytes) -> tuple[int, dict[str, object]]:
    """Status and JSON of an HTTP answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


class Broken:
    """An index that is not there any more."""

    def search(self, query: str, k: int) -> list:
        raise OSError("the index is gone")


def wait_until(state) -> None:
    """Wait for a state of the server's other threads."""
    ticking = threading.Event()
    while not state():
        ticking.wait(0.01)
