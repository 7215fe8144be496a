"""A server on this machine that misbehaves as asked: plain files, and the protocol of the Hugging Face hub."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

COMMIT = "a" * 40
TOKEN = "hf_CanaryOfTheTests"


@dataclass(frozen=True)
class Request:
    """What was asked for: HEAD is not noted."""

    path: str
    range: str | None
    if_range: str | None
    authorization: str | None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer to a GET; without any of these, nothing."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body, then the connection is closed
    reset: bool = False  # with `cut_after`: rudely, so that bytes on their way may be lost
    short_by: int = 0  # Content-Length, and the body, are too short by so much
    wrong_bytes: bool = False  # of the right length
    ignore_range: bool = False
    ignore_if_range: bool = False


@dataclass
class Server:
    """`files` by path; `faults` by path, one for each GET until they are used up; `requests` that came."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    waiting: Callable[[], object] = lambda: None  # called before each body

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the GETs of a path, in order."""
        return [request.range for request in self.requests if request.path == path]


@dataclass
class Hub(Server):
    """The hub with repositories: `repositories["datasets/laion/OIG"] = {name: bytes}`; `.gz` and the like are LFS.

    It takes models too: `branches["org/model"]["main"] = {name: bytes}`, of repositories that are there, or of `org`.
    `objects` are the large files that came, by SHA-256, and `private` the repositories that were made so.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)

    def add(self, repository: str, files: dict[str, bytes]) -> None:
        """`repository` is datasets/ORG/NAME, or ORG/NAME for a model."""
        self.repositories[repository] = files
        for name, body in files.items():
            path = self.path(repository, name)
            self.files[path] = body
            self.headers[path] = {"ETag": f'"{digest(name, body)}"', "X-Repo-Commit": COMMIT}

    def path(self, repository: str, name: str) -> str:
        return f"/{repository}/resolve/{COMMIT}/{name}"

    def fetched(self, repository: str) -> list[str]:
        """The names of the files of a repository that were asked for, in order."""
        start = self.path(repository, "")
        return [request.path.removeprefix(start) for request in self.requests if request.path.startswith(start)]


def is_lfs(name: str) -> bool:
    return name.endswith((".gz", ".zst", ".safetensors", ".bin"))


def digest(name: str, body: bytes) -> str:
    """The entity tag that the hub gives a file: SHA-256 with LFS, else git's name of a blob."""
    return hashlib.sha256(body).hexdigest() if is_lfs(name) else git_name(body)


def git_name(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextlib.contextmanager
def serving(kind: type[Server] = Server) -> Iterator[Server]:
    """A server while the block runs."""
    with _Listener(("127.0.0.1", 0), _Handler) as listener:
        listener.served = served = kind(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield served
        listener.shutdown()
        thread.join()


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away, and connections that were reset, are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def served(self) -> Server:
        return self.server.served

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        header = self.headers.get
        self.served.requests.append(Request(path, header("Range"), header("If-Range"), header("Authorization")))
        self._answer()

    def do_POST(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        content = self.rfile.read(int(self.headers["Content-Length"]))
        authorization = self.headers.get("Authorization")
        self.served.requests.append(Request(path, None, None, authorization))
        faults = self.served.faults.get(path, [])
        if authorization != f"Bearer {TOKEN}":
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}")
        elif faults:
            self._send(faults.pop(0).status, {}, b"not now")
        else:
            status, answer = _Uploads(self.served).post(path, content)
            self._send(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        """Take a large file of a hub; else answer as storage does that takes nothing for an hour."""
        if self.path.startswith("/lfs/"):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            faults = self.served.faults.get(self.path, [])
            if not faults:
                self.served.objects[hashlib.sha256(content).hexdigest()] = content
            self._send(faults.pop(0).status if faults else 200, {"Connection": "close"}, b"")
            return
        self._send(503, {"Retry-After": "3600", "Connection": "close"}, b"")

    def _answer(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        faults = self.served.faults.get(path, [])
        fault = faults.pop(0) if faults and self.command == "GET" else Fault()
        if fault.status != 200:
            self._send(fault.status, fault.headers, b"not now")
        elif path.startswith("/api/"):
            self._api(path)
        elif self._is_gated(path):
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"}, b"")
        elif path in self.served.files:
            self._file(path, fault)
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"no such file")

    def _is_gated(self, path: str) -> bool:
        return any(path.startswith(f"/{name}/") for name in getattr(self.served, "gated", ()))

    def _file(self, path: str, fault: Fault) -> None:
        body, headers = self.served.files[path], dict(self.served.headers.get(path, {}))
        whole = len(body)
        if fault.wrong_bytes:
            body = bytes(byte ^ 1 for byte in body)
        status, first = 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        holds = self.headers.get("If-Range") in (None, headers.get("ETag"), headers.get("Last-Modified"))
        if asked and (holds or fault.ignore_if_range) and not fault.ignore_range:
            first = int(asked[1])
            if first >= whole:
                self._send(416, {"Content-Range": f"bytes */{whole}"}, b"")
                return
            status, headers["Content-Range"] = 206, f"bytes {first}-{whole - 1}/{whole}"
        body = body[first : whole - fault.short_by]
        self._send(status, headers | fault.headers, body, cut_after=fault.cut_after, reset=fault.reset)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, *, cut_after: int | None = None, reset: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.served.waiting()
        self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self.close_connection = True
        if reset:
            # Closed with nothing to linger for, and at once, the system sends RST in place of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _api(self, path: str) -> None:
        match = re.fullmatch(r"/api/(datasets/[^/]+/[^/]+|models/[^/]+/[^/]+)(/tree/.*|/revision/.*)?", path)
        name = match[1].removeprefix("models/") if match else ""
        files = getattr(self.served, "repositories", {}).get(name)
        if files is None:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
            return
        if (match[2] or "").startswith("/tree/"):
            answer: object = [_entry(each, body) for each, body in files.items()]
        else:
            identity = name.removeprefix("datasets/")
            siblings = [{"rfilename": each} for each in files]
            private = name in self.served.private
            answer = {"id": identity, "sha": COMMIT, "private": private, "siblings": siblings}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


class _Uploads:
    """The part of the hub's protocol that takes models: repositories, branches, large files, commits."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def post(self, path: str, content: bytes) -> tuple[int, object]:
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if match := re.fullmatch(r"/(org/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [self._object(each) for each in json.loads(content)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        if match is None or match[1] not in self._hub.repositories:
            return 404, {"error": "Repository not found"}
        branches = self._hub.branches.setdefault(match[1], {"main": {}})
        if match[2] == "branch":
            there = match[3] in branches
            branches.setdefault(match[3], dict(branches["main"]))
            return (409 if there else 200), {}
        if match[2] == "preupload":
            names = [each["path"] for each in json.loads(content)["files"]]
            modes = {name: "lfs" if is_lfs(name) else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]}
        self._commit(branches[match[3]], [json.loads(line) for line in content.splitlines()])
        return 200, {"commitOid": COMMIT, "commitUrl": f"{self._hub.address}/{match[1]}/commit/{COMMIT}"}

    def _create(self, asked: dict[str, str]) -> tuple[int, object]:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "org":
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if asked.get("visibility") == "private" or asked.get("private"):
            self._hub.private.add(name) if name not in self._hub.repositories else None
        status = 409 if name in self._hub.repositories else 200
        self._hub.repositories.setdefault(name, {})
        return status, {"url": f"{self._hub.address}/{name}"}

    def _object(self, asked: dict[str, object]) -> dict[str, object]:
        if asked["oid"] in self._hub.objects:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self._hub.address}/lfs/{asked['oid']}"}}}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._hub.objects[value["oid"]]


def _entry(name: str, body: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(body), "oid": git_name(body)}
    if is_lfs(name):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry
