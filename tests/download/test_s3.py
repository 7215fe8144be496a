"""S3-compatible storage (`s3`), by the real client: moto's server for contents, ours for faults."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_storage
from hub_server import Fault, Server

from openchatkit.download import command as fetching
from openchatkit.download import sources
from openchatkit.errors import Interrupted, UserError

BODY = bytes(range(256)) * 8192
HALF = len(BODY) // 2


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3_storage.set_keys(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with s3_storage.serve() as address:
        yield address


@pytest.fixture
def storage(moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    """A client that may put objects into the bucket `data`, where downloads find them."""
    with s3_storage.make_bucket(moto, "data", monkeypatch, tmp_path) as client:
        yield client


@pytest.fixture
def faulty(server: Server, keys: None, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Storage with one object, s3://data/a.jsonl, that misbehaves as asked."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    server.files["/data/a.jsonl"] = BODY
    server.headers["/data/a.jsonl"] = {"ETag": f'"{hashlib.md5(BODY).hexdigest()}"'}
    return server


def test_an_object_comes_once(storage, tmp_path, retry, waits):
    storage.put_object(Bucket="data", Key="deep/a.jsonl", Body=BODY, ChecksumAlgorithm="SHA256")
    for _ in range(2):
        path = sources.fetch("s3://data/deep/a.jsonl", tmp_path, retry=retry)
        assert path == tmp_path / "a.jsonl"
        assert path.read_bytes() == BODY
    assert waits == []


@pytest.mark.parametrize("prefix", ["", "deep/"])
def test_all_objects_below_a_folder(storage, tmp_path, retry, prefix):
    for key in ("deep/a.jsonl", "deep/er/b.jsonl", "deep/er/", "deeper.jsonl"):
        storage.put_object(Bucket="data", Key=key, Body=b"" if key.endswith("/") else key.encode())
    found = sources.fetch_source(f"s3://data/{prefix}", tmp_path, retry=retry)
    expected = {"deep/a.jsonl", "deep/er/b.jsonl"} | ({"deeper.jsonl"} if not prefix else set())
    assert {f"{prefix}{path.relative_to(tmp_path).as_posix()}" for path in found} == expected
    assert all(path.read_text() == f"{prefix}{path.relative_to(tmp_path).as_posix()}" for path in found)


def test_one_object_that_is_slow_to_be_found_is_asked_for_alone(storage, tmp_path, retry, waits, monkeypatch):
    from openchatkit.download import s3
    from openchatkit.download.retry import TransientError

    asked, remote = [], s3._remote

    def busy(client, bucket, key, *rest):
        asked.append(key)
        if asked.count(key) < 4:
            raise TransientError("the storage answers 503")
        return remote(client, bucket, key, *rest)

    for key in "abcd":
        storage.put_object(Bucket="data", Key=key, Body=b"body")
    monkeypatch.setattr(s3, "_remote", busy)
    assert len(sources.fetch_source("s3://data/", tmp_path, retry=retry)) == 4
    assert asked == list("aaaabbbbccccdddd")


def test_damage_in_the_storage_is_seen(storage, tmp_path, retry):
    """The object's checksum stays what it was when its bytes change below it."""
    from moto.s3.models import s3_backends

    storage.put_object(Bucket="data", Key="a.jsonl", Body=BODY, ChecksumAlgorithm="SHA256")
    stored = next(iter(s3_backends.values()))["aws"].buckets["data"].keys["a.jsonl"]
    stored._value_buffer.seek(0)
    stored._value_buffer.write(b"other")
    assert storage.head_object(Bucket="data", Key="a.jsonl")["ContentLength"] == len(BODY)
    message = (
        f"s3://data/a.jsonl came twice with other bytes .*: expected sha256 {hashlib.sha256(BODY).hexdigest()}, found"
    )
    with pytest.raises(UserError, match=message):
        sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([Fault(status=500)], [None, None]),
        ([Fault(status=503, headers={"Retry-After": "9"})], [None, None]),
        ([Fault(cut_after=HALF)], [None, f"bytes={HALF}-"]),
        ([Fault(cut_after=HALF), Fault(ignore_range=True)], [None, f"bytes={HALF}-"]),
        ([Fault(wrong_bytes=True)], [None, None]),
    ],
    ids=["500", "503", "cut", "ignores Range", "wrong bytes"],
)
def test_what_breaks_is_mended(faulty, tmp_path, retry, waits, faults, ranges):
    faulty.faults["/data/a.jsonl"] = faults.copy()
    assert sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry).read_bytes() == BODY
    asked = faulty.ranges("/data/a.jsonl")
    assert len(asked) == len(ranges)
    # The client hands bytes on in blocks of its own, so the last of them before the cut may be asked for again.
    for got, expected in zip(asked, ranges, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or HALF - 300_000 < int(re.fullmatch(r"bytes=(\d+)-", got)[1]) <= HALF
    if faults[0].status == 503:
        assert waits == [9]


def test_bytes_that_stay_wrong_never_get_a_name(faulty, tmp_path, retry):
    faulty.faults["/data/a.jsonl"] = [Fault(wrong_bytes=True)] * 2
    with pytest.raises(UserError, match=f"expected md5 {hashlib.md5(BODY).hexdigest()}, found md5"):
        sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry)
    assert list(tmp_path.iterdir()) == []


def test_a_rerun_asks_for_the_missing_bytes_alone(faulty, tmp_path, retry):
    faulty.faults["/data/a.jsonl"] = [Fault(cut_after=HALF)] + [Fault(status=503)] * 50
    with pytest.raises(Interrupted, match=r"s3://data/a\.jsonl: the storage answers 503"):
        sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry)
    kept = (tmp_path / ".a.jsonl.part").stat().st_size
    assert 0 < kept <= HALF
    faulty.faults.clear()
    faulty.requests.clear()
    assert sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry).read_bytes() == BODY
    assert faulty.ranges("/data/a.jsonl") == [f"bytes={kept}-"]


def test_an_object_that_changed_starts_over(storage, tmp_path, retry):
    (tmp_path / ".a.jsonl.part").write_bytes(b"old")
    (tmp_path / ".a.jsonl.part.json").write_text('{"version": "\\"of before\\"", "size": 9, "digests": []}')
    storage.put_object(Bucket="data", Key="a.jsonl", Body=BODY)
    assert sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry).read_bytes() == BODY


def test_checksums_of_parts_and_of_encrypted_objects_are_no_digests(keys):
    from openchatkit.download.digests import Digest
    from openchatkit.download.s3 import _digests

    whole = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    sha256, md5 = Digest("sha256", hashlib.sha256(BODY).hexdigest()), Digest("md5", "1" * 32)
    tag = '"' + "1" * 32 + '"'
    assert _digests({"ETag": tag, "ChecksumSHA256": whole, "ChecksumType": "FULL_OBJECT"}) == (sha256, md5)
    assert _digests({"ETag": '"' + "1" * 32 + '-4"', "ChecksumSHA256": f"{whole}-4"}) == ()
    assert _digests({"ETag": tag, "ChecksumSHA256": whole, "ChecksumType": "COMPOSITE"}) == (md5,)
    assert _digests({"ETag": tag, "ServerSideEncryption": "aws:kms"}) == ()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://data/none", "s3://data/none: there is no such object: check the key; a folder ends in /"),
        ("s3://nowhere/a", "s3://nowhere/a: there is no such bucket: check the address and AWS_ENDPOINT_URL"),
        ("s3://nowhere/", "s3://nowhere/: there is no such bucket: check the address and AWS_ENDPOINT_URL"),
        ("s3://data/none/", "s3://data/none/ holds no objects: check the bucket and the folder"),
        ("s3:///a", "s3:///a is not an object: expected s3://bucket/key, or s3://bucket/folder/"),
        ("s3://B!/a", "s3://B!/a: "),
    ],
)
def test_what_is_not_there(storage, tmp_path, retry, waits, address, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        sources.fetch_source(address, tmp_path, retry=retry)
    assert waits == []


def test_access_denied(faulty, tmp_path, retry):
    denied = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
    faulty.files["/data/a.jsonl"] = denied
    faulty.faults["/data/a.jsonl"] = [Fault(status=403)]
    with pytest.raises(
        UserError, match=r"s3://data/a\.jsonl: the storage refuses \(AccessDenied\): check AWS_ACCESS_KEY"
    ):
        sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_no_keys(storage, tmp_path, monkeypatch, name):
    monkeypatch.delenv(name)
    message = f"needs the environment variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: {name} not set"
    with pytest.raises(UserError, match=message):
        sources.fetch("s3://data/a.jsonl", tmp_path)


def test_nobody_is_there(keys, tmp_path, retry, waits, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"s3://data/a\.jsonl: cannot be reached: check the address and the connection"):
        sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry)


def test_an_endpoint_that_is_none(keys, tmp_path, retry, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(UserError, match=r"cannot be set up: .*: check AWS_ENDPOINT_URL and AWS_REGION"):
        sources.fetch("s3://data/a.jsonl", tmp_path, retry=retry)


def test_boto3_is_not_installed(keys, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(UserError, match=r"s3:// needs boto3: pip install 'openchatkit\[s3\]'"):
        sources.fetch("s3://data/a.jsonl", tmp_path)


def test_the_command_never_prints_keys(storage, tmp_path, capsys):
    storage.put_object(Bucket="data", Key="a.jsonl", Body=BODY)
    for key, status in (("a.jsonl", 0), ("none", 2)):
        with pytest.raises(SystemExit) as end:
            fetching.prepare_data(["-s", f"s3://data/{key}", "-d", str(tmp_path), "--debug"])
        assert end.value.code == status
        printed = capsys.readouterr()
        assert s3_storage.SECRET not in printed.out + printed.err
