"""Uploads to the hub, by its real client: one commit of whole files, gone on with, and one line for each refusal."""

import hashlib
import socket

import pytest
from hub_server import TOKEN, Fault

from openchatkit.download.hub_upload import upload_folder
from openchatkit.errors import Interrupted, UserError
from openchatkit.tools import hub_upload

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "more/notes.txt": b"notes"}


@pytest.fixture
def hub(hub, monkeypatch):
    """The hub, with the protocol of large files that the server has; the other one has servers of its own."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    for name, content in {**FILES, ".lock": b"", ".model.tmp": b"half"}.items():
        (folder / name).write_bytes(content)
    return folder


def large_files(hub):
    return [request.path for request in hub.requests if request.path.endswith("/batch")]


def test_a_new_repository_has_all_files(hub, folder, retry, waits, capsys):
    with pytest.raises(SystemExit) as ended:
        hub_upload.main([str(folder), "org/model"])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert printed.out.startswith(f"{hub.address}/org/model/commit/")
    assert hub.branches == {"org/model": {"main": FILES}}
    assert hub.private == set()
    assert {request.authorization for request in hub.requests} - {None} == {f"Bearer {TOKEN}"}
    assert TOKEN not in printed.out + printed.err


def test_a_branch_is_made_and_others_stay(hub, folder, retry):
    upload_folder(folder, "org/model", retry=retry)
    (folder / "config.json").write_bytes(b'{"a": 1}')
    for _ in range(2):
        upload_folder(folder, "org/model", branch="step-7", retry=retry)
    assert hub.branches["org/model"] == {"main": FILES, "step-7": FILES | {"config.json": b'{"a": 1}'}}


def test_a_private_one_stays_private(hub, folder, retry):
    upload_folder(folder, "org/secret", private=True, retry=retry)
    assert hub.private == {"org/secret"}
    hub.repositories["org/open"] = {}
    with pytest.raises(UserError, match=r"^--private: org/open is there already and everyone can read it"):
        upload_folder(folder, "org/open", private=True, retry=retry)
    assert "org/open" not in hub.branches


def test_an_upload_that_was_stopped_sends_only_what_is_missing(hub, folder, retry, waits):
    (folder / "second.safetensors").write_bytes(b"second" * 1000)
    oids = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES if "safe" in name}
    second = hashlib.sha256((folder / "second.safetensors").read_bytes()).hexdigest()
    hub.faults[f"/lfs/{second}"] = [Fault(status=400)] * 20
    with pytest.raises(UserError, match=r"^cannot upload to org/model: the hub answers 400"):
        upload_folder(folder, "org/model", retry=retry)
    assert hub.branches == {"org/model": {"main": {}}}
    assert set(hub.objects) == set(oids.values())
    hub.faults.clear()
    sent = dict(hub.objects)
    hub.objects = Kept(sent)
    upload_folder(folder, "org/model", retry=retry)
    assert hub.objects.written == [second]
    assert hub.branches["org/model"]["main"].keys() == {*FILES, "second.safetensors"}


class Kept(dict):
    """A dict that notes what is written to it."""

    def __init__(self, content):
        super().__init__(content)
        self.written = []

    def __setitem__(self, key, value):
        self.written.append(key)
        super().__setitem__(key, value)


def test_a_hub_that_is_busy_is_asked_again_and_given_up(hub, folder, retry, waits):
    hub.faults["/api/repos/create"] = [Fault(status=503)] * 2
    upload_folder(folder, "org/model", retry=retry)
    assert len(waits) == 2
    hub.faults["/api/repos/create"] = [Fault(status=503)] * 20
    with pytest.raises(Interrupted, match="the hub answers 503"):
        upload_folder(folder, "org/model", retry=retry)


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/model", "hf_other", "the hub does not know the token: set HF_TOKEN to one that may write there"),
        ("elsewhere/model", TOKEN, "the token may not write there: set HF_TOKEN to one that may, or name another"),
        ("a/b/c", TOKEN, "not a hub name; expected ORG/NAME"),
    ],
)
def test_refusals(hub, folder, retry, monkeypatch, name, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        upload_folder(folder, name, retry=retry)
    assert str(caught.value).startswith(f"cannot upload to {name}: {message}")
    assert "\n" not in str(caught.value)
    assert not hub.branches


def test_no_network(hub, folder, retry, monkeypatch):
    import huggingface_hub.constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match=r"^cannot upload to org/model: the hub cannot be reached; connect and run"):
            upload_folder(folder, "org/model", retry=retry)


def test_what_is_wrong_before_the_hub_is_asked(hub, tmp_path, folder, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "missing", "model/config.json"):
        with pytest.raises(UserError, match="is no folder with files: expected one such as"):
            upload_folder(tmp_path / nothing, "org/model")
    with pytest.raises(SystemExit) as ended:
        hub_upload.main([str(folder), "org/model", "--token", "hf_secret"])
    assert ended.value.code == 2
    assert "hf_secret" not in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^uploads need a token that may write: set HF_TOKEN"):
        upload_folder(folder, "org/model")
    assert not hub.requests
