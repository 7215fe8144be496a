"""`data/OIG/prepare.py` as a user runs it, with the real client, against a server that speaks the hub's protocol."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from openchatkit import download, paths
from openchatkit.errors import UserError

COMMIT = "a" * 40
FILES = {
    "unified_ni.jsonl.gz": b"x" * 1000,
    "unified_p3.jsonl": b"{}\n",
    "unified_p3_more.jsonl": b"[]",
    "README.md": b"",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for the one data set laion/OIG; notes which files were sent."""

    sent: list[str]

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/datasets/laion/OIG/tree/"):
            body = json.dumps([self._entry(name) for name in FILES]).encode()
        elif path.startswith("/api/datasets/laion/OIG"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "laion/OIG", "sha": COMMIT, "private": False, "siblings": siblings}).encode()
        elif "/resolve/" in path and name in FILES:
            body = FILES[name]
            if not head:
                self.sent.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": hashlib.sha1(FILES[name]).hexdigest()}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    handler = type("NotingHub", (Hub,), {"sent": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the command needs, so that it fetches into a folder of the test's."""
    shutil.copytree(paths.ROOT / "openchatkit", tmp_path / "openchatkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data" / "OIG").mkdir(parents=True)
    shutil.copy(paths.ROOT / "data" / "OIG" / "prepare.py", tmp_path / "data" / "OIG")
    return tmp_path


def prepare(checkout: Path, endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(checkout / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(checkout),
        **environment,
    }
    command = [sys.executable, "data/OIG/prepare.py", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def address(hub: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def test_fetches_what_is_named_once(hub: http.server.ThreadingHTTPServer, checkout: Path) -> None:
    files = checkout / "data" / "OIG" / "files"
    for _ in range(2):
        done = prepare(checkout, address(hub), "--files", "unified_ni")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{files / 'unified_ni.jsonl.gz'}\n"
        assert (files / "unified_ni.jsonl.gz").read_bytes() == FILES["unified_ni.jsonl.gz"]
        assert hub.RequestHandlerClass.sent == ["unified_ni.jsonl.gz"]
    done = prepare(checkout, address(hub), "--files", "unified_p3", "unified_n*")
    assert [Path(line).name for line in done.stdout.split()] == ["unified_ni.jsonl.gz", "unified_p3.jsonl"]
    assert hub.RequestHandlerClass.sent[1:] == ["unified_p3.jsonl"]


def test_fetches_all_records(hub: http.server.ThreadingHTTPServer, checkout: Path) -> None:
    assert prepare(checkout, address(hub)).returncode == 0
    assert sorted(set(hub.RequestHandlerClass.sent)) == sorted(set(FILES) - {"README.md"})


def test_a_name_that_is_not_there(hub: http.server.ThreadingHTTPServer, checkout: Path) -> None:
    done = prepare(checkout, address(hub), "--files", "unified_nil")
    assert done.returncode == 2
    message = "error: laion/OIG holds no file unified_nil: expected one of README.md, unified_ni.jsonl.gz, unified_p3"
    assert done.stderr.splitlines()[-1].startswith(message)
    assert hub.RequestHandlerClass.sent == []


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_offline(checkout: Path, environment: dict[str, str]) -> None:
    done = prepare(checkout, "http://127.0.0.1:9", "--files", "unified_ni", **environment)
    assert done.returncode == 2
    message = "error: cannot fetch laion/OIG: the hub cannot be reached; connect and run again"
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert not (checkout / "data" / "OIG" / "files").exists()


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = huggingface_hub.DryRunFileInfo(
        commit_hash=COMMIT,
        file_size=10**15,
        filename="a.jsonl",
        local_path="a.jsonl",
        is_cached=False,
        will_download=True,
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: [offered])
    with pytest.raises(UserError, match=r"1000000\.0 GB are to be fetched and .* has room for .*: make room, or name"):
        download.fetch_dataset("laion/OIG", [], tmp_path)


def test_a_data_set_that_the_hub_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: http.server.ThreadingHTTPServer
) -> None:
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", address(hub))
    monkeypatch.setattr(hf_api, "ENDPOINT", address(hub), raising=False)
    with pytest.raises(UserError, match="cannot fetch laion/nope: the hub knows no such data set"):
        download.fetch_dataset("laion/nope", [], tmp_path)
