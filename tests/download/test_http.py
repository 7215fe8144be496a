"""Downloads by http and https (`http`, `transfer`, `retry`, `sidecar`): resumed, checked, refused, named when whole."""

import base64
import datetime
import email.utils
import errno
import hashlib
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from hub_server import Fault, Server, serving
from loguru import logger

from openchatkit import progress
from openchatkit.download import sources
from openchatkit.download.retry import RetryPolicy
from openchatkit.errors import Interrupted, UserError

BODY = bytes(range(256)) * 8192  # 2 MiB, more than one piece
SHA256 = hashlib.sha256(BODY).hexdigest()
HALF = len(BODY) // 2


@pytest.fixture
def address(server: Server) -> str:
    server.files["/data.jsonl"] = BODY
    server.headers["/data.jsonl"] = {"ETag": '"one"'}
    return f"{server.address}/data.jsonl"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_once(server, address, tmp_path, retry, waits):
    for _ in range(2):
        path = sources.fetch(address, tmp_path / "files", retry=retry)
        assert path == tmp_path / "files" / "data.jsonl"
        assert path.read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [None]
    assert waits == []
    assert names(tmp_path / "files") == [".data.jsonl.fetched.json", "data.jsonl"]


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([Fault(status=500)], [None, None]),
        ([Fault(status=503), Fault(status=502)], [None, None, None]),
        ([Fault(cut_after=HALF)], [None, f"bytes={HALF}-"]),
        ([Fault(cut_after=0)], [None, None]),
        ([Fault(cut_after=HALF), Fault(status=500)], [None, f"bytes={HALF}-", f"bytes={HALF}-"]),
        ([Fault(cut_after=HALF), Fault(ignore_range=True)], [None, f"bytes={HALF}-"]),
        (
            [Fault(cut_after=HALF), Fault(ignore_range=True, cut_after=10), Fault()],
            [None, f"bytes={HALF}-", "bytes=10-"],
        ),
    ],
    ids=["500", "5xx twice", "cut", "cut at once", "cut and 500", "ignores Range", "ignores Range, cut"],
)
def test_what_breaks_goes_on(server, address, tmp_path, retry, waits, faults, ranges):
    server.faults["/data.jsonl"] = faults.copy()
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == ranges
    assert len(waits) == len(ranges) - 1
    assert {request.if_range for request in server.requests if request.range} <= {'"one"'}


def test_a_reset_goes_on(server, address, tmp_path, retry, waits):
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF, reset=True)]
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert len(waits) == 1


def test_waits_double_and_differ(server, address, tmp_path, retry, waits):
    server.faults["/data.jsonl"] = [Fault(status=500)] * 7
    sources.fetch(address, tmp_path, retry=retry)
    assert all(0.5 * min(60, 2**n) <= wait <= min(60, 2**n) for n, wait in enumerate(waits))
    assert len(waits) == 7


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_kept_to(server, address, tmp_path, retry, waits, form):
    until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    text = "97" if form == "seconds" else email.utils.format_datetime(until, usegmt=True)
    server.faults["/data.jsonl"] = [Fault(status=429, headers={"Retry-After": text})]
    sources.fetch(address, tmp_path, retry=retry)
    assert 90 < waits[0] <= 100


def test_trying_ends(server, address, tmp_path, retry, waits):
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF)] + [Fault(status=503)] * 50
    with pytest.raises(
        Interrupted, match=r"data\.jsonl: the server answers 503 .*: run again later, it goes on from"
    ) as e:
        sources.fetch(address, tmp_path, retry=retry)
    assert e.value.exit_status == 75
    assert len(waits) == RetryPolicy().tries - 1
    assert names(tmp_path) == [".data.jsonl.part", ".data.jsonl.part.json"]
    # Only the missing bytes come when it is run again, with a digest by now.
    server.faults.clear()
    server.requests.clear()
    assert sources.fetch(address, tmp_path, sha256=SHA256, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [f"bytes={HALF}-"]
    assert names(tmp_path) == [".data.jsonl.fetched.json", "data.jsonl"]


def test_a_server_that_never_resumes_is_given_up(server, address, tmp_path, retry, waits):
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF, ignore_range=True)] * 50
    with pytest.raises(Interrupted, match="the connection broke"):
        sources.fetch(address, tmp_path, retry=retry)
    assert len(waits) <= RetryPolicy().tries


def test_a_long_wait_is_left_to_the_user(server, address, tmp_path, retry, waits):
    server.faults["/data.jsonl"] = [Fault(status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(Interrupted, match=r"answers 429 .*, and asks to wait 86400 seconds: run again later"):
        sources.fetch(address, tmp_path, retry=retry)
    assert waits == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(server, address, tmp_path, retry, waits, status):
    server.faults["/data.jsonl"] = [Fault(status=status)] * 9
    with pytest.raises(UserError, match=rf"^{re.escape(address)}: the server answers {status} .*: (check|it is not)"):
        sources.fetch(address, tmp_path, retry=retry)
    assert waits == []
    assert names(tmp_path) == []


def test_nobody_is_there(tmp_path, retry, waits):
    with pytest.raises(UserError, match=r"cannot be reached .*: check the address and the connection") as error:
        sources.fetch("http://127.0.0.1:9/a.jsonl", tmp_path, retry=retry)
    assert error.value.exit_status == 2
    assert len(waits) == 1


def test_a_file_that_changed_starts_over(server, address, tmp_path, retry):
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF)] + [Fault(status=500)] * 50
    with pytest.raises(Interrupted):
        sources.fetch(address, tmp_path, retry=retry)
    changed = BODY[::-1] + b"more"
    server.files["/data.jsonl"], server.headers["/data.jsonl"] = changed, {"ETag": '"two"'}
    server.faults.clear()
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == changed


@pytest.mark.parametrize(
    ("more", "headers"), [(b"", {"ETag": '"two"'}), (b"more", {})], ids=["another tag", "another size"]
)
def test_two_versions_are_never_joined(server, address, tmp_path, more, headers):
    """By a server that heeds no If-Range."""
    changed = BODY[::-1] + more

    def change(_):
        server.files["/data.jsonl"], server.headers["/data.jsonl"] = changed, headers

    server.faults["/data.jsonl"] = [Fault(cut_after=HALF), Fault(ignore_if_range=True)]
    assert sources.fetch(address, tmp_path, retry=RetryPolicy(sleep=change)).read_bytes() == changed
    assert server.ranges("/data.jsonl") == [None, f"bytes={HALF}-", None]


def test_a_tag_that_cannot_be_sent_back(server, address, tmp_path, retry):
    server.headers["/data.jsonl"] = {"ETag": '"\xe9"'}
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF)]
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [None, None]


def test_a_range_that_is_absurd(server, address, tmp_path, retry):
    server.faults["/data.jsonl"] = [Fault(status=206, headers={"Content-Range": "bytes 0-5/" + "9" * 5000})] * 50
    with pytest.raises(Interrupted, match="sends a range and does not say which"):
        sources.fetch(address, tmp_path, retry=retry)


def test_a_death_between_note_and_name(tmp_path, retry, monkeypatch):
    """The file of before, of the same size, is not taken for the new one."""
    source, files = tmp_path / "a.jsonl", tmp_path / "files"
    source.write_bytes(BODY)
    sources.fetch(str(source), files, retry=retry)
    source.write_bytes(BODY[::-1])
    replace = os.replace

    def die(old, new):
        if Path(new).name == "a.jsonl":
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch(str(source), files, retry=retry)
    assert sources.fetch(str(source), files, retry=retry).read_bytes() == BODY[::-1]


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_without_a_validator_only_a_digest_lets_it_go_on(server, address, tmp_path, retry, sha256):
    server.headers.clear()
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF)] + [Fault(status=500)] * 50
    with pytest.raises(Interrupted):
        sources.fetch(address, tmp_path, sha256=sha256, retry=retry)
    server.faults.clear()
    server.requests.clear()
    assert sources.fetch(address, tmp_path, sha256=sha256, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [f"bytes={HALF}-" if sha256 else None]


def test_what_another_run_left_of_another_file_goes(server, address, tmp_path, retry):
    (tmp_path / ".data.jsonl.part").write_bytes(BODY[::-1])
    (tmp_path / ".data.jsonl.part.json").write_text("{")
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [None]


def test_a_date_is_a_validator(server, address, tmp_path, retry):
    server.headers["/data.jsonl"] = {"ETag": 'W/"weak"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    server.faults["/data.jsonl"] = [Fault(cut_after=HALF)]
    sources.fetch(address, tmp_path, retry=retry)
    assert server.requests[1].if_range == "Thu, 01 Jan 2026 00:00:00 GMT"


def test_what_is_whole_but_unnamed_is_not_asked_for_again(server, address, tmp_path, retry):
    (tmp_path / ".data.jsonl.part").write_bytes(BODY)
    (tmp_path / ".data.jsonl.part.json").write_text(f'{{"version": "x", "size": {len(BODY)}, "digests": []}}')
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert server.requests == []


@pytest.mark.parametrize(("size", "requests"), [(len(BODY), 1), (len(BODY) + 5, 2)])
def test_nothing_behind_the_last_byte(server, address, tmp_path, retry, size, requests):
    """416: what is here is the whole file, or not of this file."""
    (tmp_path / ".data.jsonl.part").write_bytes((BODY + b"12345")[:size])
    (tmp_path / ".data.jsonl.part.json").write_text('{"version": "\\"one\\"", "size": null, "digests": []}')
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert len(server.requests) == requests


def digest_of(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


@pytest.mark.parametrize("said", ["argument", "address", "server"])
@pytest.mark.parametrize("faults", [1, 2])
def test_wrong_bytes_of_the_right_length(server, address, tmp_path, retry, capsys, said, faults):
    if said == "server":
        server.headers["/data.jsonl"]["Repr-Digest"] = f"sha-512=:eA==:, {digest_of(BODY)}"
    server.faults["/data.jsonl"] = [Fault(wrong_bytes=True)] * faults
    asked, sha256 = (f"{address}#sha256={SHA256.upper()}", None) if said == "address" else (address, None)
    if said == "argument":
        sha256 = SHA256
    if faults == 1:
        path = sources.fetch(asked, tmp_path, sha256=sha256, retry=retry)
        assert path.read_bytes() == BODY
        assert re.search(rf"expected sha256 {SHA256}, found sha256 [0-9a-f]{{64}}; fetching", capsys.readouterr().err)
    else:
        found = hashlib.sha256(bytes(byte ^ 1 for byte in BODY)).hexdigest()
        message = (
            rf"data\.jsonl came twice with other bytes .*: expected sha256 {SHA256}, found sha256 {found}; nothing"
        )
        with pytest.raises(UserError, match=message):
            sources.fetch(asked, tmp_path, sha256=sha256, retry=retry)
        assert names(tmp_path) == []
    assert server.ranges("/data.jsonl") == [None, None]


def test_a_short_content_length_goes_unseen_only_without_a_digest(server, address, tmp_path, retry):
    server.faults["/data.jsonl"] = [Fault(short_by=10)]
    assert sources.fetch(address, tmp_path / "a", retry=retry).stat().st_size == len(BODY) - 10
    server.faults["/data.jsonl"] = [Fault(short_by=10)]
    assert sources.fetch(address, tmp_path / "b", sha256=SHA256, retry=retry).read_bytes() == BODY


@pytest.mark.parametrize("sha256", ["12", "g" * 64])
def test_a_digest_that_is_none(address, tmp_path, sha256):
    with pytest.raises(UserError, match=rf"expected a SHA-256 of 64 hexadecimal digits, got '{sha256}'"):
        sources.fetch(f"{address}#sha256={sha256}", tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://127.0.0.1:9/", "names no file: expected https://host/folder/file.jsonl"),
        ("https:///a.jsonl", "names no file"),
        ("http://127.0.0.1:9/..%2f", "names no file"),
        ("http://[::1/hunter2", "not a valid URL (Invalid IPv6 URL): expected https://host/folder/file.jsonl"),
        ("https://a..b/a.jsonl", "'idna' codec"),
        (f"./{'a' * 300}", "no such file or folder"),
        ("ftp://127.0.0.1/a", "expected http://, https://, s3:// or a path"),
        (
            "https://me:hunter2@127.0.0.1/a",
            "the address holds a user or a password, which does not belong on a command",
        ),
        ("./nowhere", "no such file or folder"),
    ],
)
def test_addresses_that_are_none(tmp_path, address, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sources.fetch(address, tmp_path)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "HTTP_PROXY",
            "foo://me:hunter2@host",
            "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not an address: expected http",
        ),
        ("HTTP_PROXY", "http://me:hunter2", "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not an address: expected http"),
        ("SSL_CERT_FILE", "/nowhere.pem", r"SSL_CERT_FILE or SSL_CERT_DIR cannot be read \(.*\): correct or unset it"),
    ],
)
def test_settings_that_are_wrong(tmp_path, monkeypatch, retry, name, value, message):
    for way in (name, name.lower()):
        monkeypatch.setenv(way, value)
    for fetch in (
        lambda: sources.fetch("http://127.0.0.1:9/a.jsonl", tmp_path, retry=retry),
        lambda: sources.fetch_dataset("laion/OIG", [], tmp_path, retry=retry),
    ):
        with pytest.raises(UserError, match=message) as error:
            fetch()
        assert "hunter2" not in str(error.value)


def test_a_socks_proxy(tmp_path, monkeypatch, retry):
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(UserError, match="a SOCKS proxy needs socksio: pip install socksio"):
        sources.fetch("http://127.0.0.1:9/a.jsonl", tmp_path, retry=retry)


def test_a_page_is_not_the_file(server, address, tmp_path, retry):
    server.headers["/data.jsonl"]["Content-Type"] = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="answers with a web page, not with the file"):
        sources.fetch(address, tmp_path, retry=retry)


def test_signatures_are_not_printed_or_written(server, address, tmp_path, retry, capsys):
    server.faults["/data.jsonl"] = [Fault(status=500)]
    path = sources.fetch(f"{address}?signature=hunter2", tmp_path, retry=retry)
    assert path.name == "data.jsonl"
    with pytest.raises(UserError) as error:
        sources.fetch(f"{address}?signature=hunter3", tmp_path, retry=retry)
    assert "is there already and came from" in str(error.value)
    written = "".join(each.read_text(errors="replace") for each in tmp_path.iterdir() if each != path)
    assert "hunter" not in str(error.value) + capsys.readouterr().err + written


def test_a_stranger_of_the_same_name_is_left_alone(server, address, tmp_path, retry):
    (tmp_path / "data.jsonl").write_text("mine")
    with pytest.raises(
        UserError, match=r"data\.jsonl is there already and did not come from http.*: remove it, or pass"
    ):
        sources.fetch(address, tmp_path, retry=retry)
    assert (tmp_path / "data.jsonl").read_text() == "mine"
    assert server.requests == []


def test_a_file_that_was_changed_here_comes_again(server, address, tmp_path, retry, capsys):
    path = sources.fetch(address, tmp_path, retry=retry)
    path.write_text("cut")
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert "was changed here or at" in capsys.readouterr().err


def test_a_disk_that_refuses_the_new_file_leaves_the_older_one(address, tmp_path, retry, monkeypatch):
    path = sources.fetch(address, tmp_path, retry=retry)
    path.write_bytes(b"mine")
    synchronise = os.fsync

    def fail(file: int) -> None:
        if os.fstat(file).st_size == len(BODY):
            raise OSError(errno.EIO, "Input/output error")
        synchronise(file)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="the disk reports an error"):
        sources.fetch(address, tmp_path, retry=retry)
    assert path.read_bytes() == b"mine"


def test_a_full_disk_is_seen_before(address, tmp_path, retry, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"2\.1 MB are needed and .* has room for 1\.0 kB: make room and run again"):
        sources.fetch(address, tmp_path, retry=retry)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_keeps_what_came(server, address, tmp_path, retry, monkeypatch):
    from openchatkit.download import transfer

    add = transfer._Partial.add

    def full(part, piece):
        if part.length >= HALF:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(part, piece)

    with monkeypatch.context() as patch:
        patch.setattr(transfer._Partial, "add", full)
        with pytest.raises(
            UserError,
            match=r"the disk is full: make room, then run the same command again: it goes on from what has come",
        ):
            sources.fetch(address, tmp_path, retry=retry)
    assert names(tmp_path) == [".data.jsonl.part", ".data.jsonl.part.json"]
    kept = (tmp_path / ".data.jsonl.part").stat().st_size
    assert kept >= HALF
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [None, f"bytes={kept}-"]


def test_ctrl_c_keeps_what_came(server, address, tmp_path, retry, monkeypatch, capsys):
    class Interrupting(progress.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress, "tqdm", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch(address, tmp_path, retry=retry)
    kept = (tmp_path / ".data.jsonl.part").stat().st_size
    assert kept > 0
    assert "are here and kept; the same command goes on from there" in capsys.readouterr().err
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    assert server.ranges("/data.jsonl") == [None, f"bytes={kept}-"]


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied", "deep")


def test_what_is_there_can_be_used_where_nobody_may_write(server, address, tmp_path, retry, monkeypatch):
    path = sources.fetch(address, tmp_path, retry=retry)
    monkeypatch.setattr("openchatkit.storage.try_lock", refuse)
    assert sources.fetch(address, tmp_path, retry=retry) == path
    with pytest.raises(UserError, match=r"cannot write .*data\.jsonl: permission denied"):
        sources.fetch(address, tmp_path / "other", retry=retry)


def test_a_folder_that_may_not_even_be_looked_into(address, tmp_path, retry, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", refuse)
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}: permission denied: "):
        sources.fetch(address, tmp_path, retry=retry)


def test_a_subfolder_that_cannot_be_read_is_not_left_out(tmp_path, retry, monkeypatch):
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "a.jsonl").write_bytes(BODY)
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: refuse() if str(path).endswith("deep") else scan(path))
    with pytest.raises(UserError, match=r"^deep cannot be read: Permission denied$"):
        sources.fetch_source(str(tmp_path / "mine"), tmp_path / "files", retry=retry)


def test_two_at_once_fetch_once(server, address, tmp_path, retry):
    second = threading.Thread(target=sources.fetch, args=(address, tmp_path), kwargs={"retry": retry})
    said = threading.Event()
    logger.add(lambda text: said.set() if "is fetched by another process: waiting for it" in text else None)
    bodies = iter([second.start])

    def body_is_due():
        # The first body is held back until the second has found that somebody is at it.
        next(bodies)()
        assert said.wait(30)

    server.waiting = body_is_due
    assert sources.fetch(address, tmp_path, retry=retry).read_bytes() == BODY
    second.join(30)
    assert said.is_set()
    assert server.ranges("/data.jsonl") == [None]
    assert names(tmp_path) == [".data.jsonl.fetched.json", "data.jsonl"]


def test_credentials_stay_with_their_host(server, tmp_path):
    from openchatkit.download import http

    with serving(Server) as other:
        other.files["/b"] = b"here"
        server.faults["/a"] = [Fault(status=302, headers={"Location": f"{other.address}/b"})]
        with http.open_url(f"{server.address}/a", 0, None, headers={"Authorization": "Bearer secret"}) as answer:
            assert b"".join(answer.pieces) == b"here"
        assert [request.authorization for request in server.requests] == ["Bearer secret"]
        assert [request.authorization for request in other.requests] == [None]


def test_a_copy_of_a_file_here(tmp_path, retry):
    source = tmp_path / "source.jsonl"
    source.write_bytes(BODY)
    path = sources.fetch(str(source), tmp_path / "files", retry=retry)
    assert path.read_bytes() == BODY
    source.write_bytes(BODY[::-1])
    assert sources.fetch(str(source), tmp_path / "files", retry=retry).read_bytes() == BODY[::-1]
    with pytest.raises(UserError, match="names a folder: expected one file"):
        sources.fetch(str(tmp_path), tmp_path / "files")


def test_a_file_that_changes_while_it_is_copied(tmp_path, retry, waits, monkeypatch):
    source = tmp_path / "source.jsonl"
    source.write_bytes(BODY)

    class Changing(progress.tqdm):
        def update(self, n=1):
            source.write_bytes(BODY[::-1])
            os.utime(source, ns=(1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(progress, "tqdm", Changing)
        with pytest.raises(UserError, match="was changed while it was copied: run again when it is complete"):
            sources.fetch(str(source), tmp_path / "files", retry=retry)
    assert waits == []
    assert not (tmp_path / "files" / "source.jsonl").exists()
    assert sources.fetch(str(source), tmp_path / "files", retry=retry).read_bytes() == BODY[::-1]


def test_a_folder_is_not_copied_into_itself(tmp_path, retry):
    (tmp_path / "a.jsonl").write_bytes(BODY)
    for inside in (tmp_path, tmp_path / "files"):
        with pytest.raises(UserError, match=r"lies in .*, which would be copied into itself: pass another folder"):
            sources.fetch_source(str(tmp_path), inside, retry=retry)
    assert names(tmp_path) == ["a.jsonl"]
