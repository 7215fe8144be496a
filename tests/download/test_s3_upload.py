"""Uploads to S3-compatible storage (`s3_upload`), by the real client to moto's server."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_storage

from openchatkit.download.retry import RetryPolicy
from openchatkit.download.s3_upload import S3Folder
from openchatkit.errors import Interrupted, UserError

PART = 5 << 20  # the smallest that S3 takes
SIZE = 2 * PART + 1000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with s3_storage.serve() as address:
        yield address


@pytest.fixture
def storage(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of storage with an empty bucket `out`, and keys for it in the environment."""
    with s3_storage.make_bucket(address, "out", monkeypatch, tmp_path) as client:
        yield client


@pytest.fixture
def folder(storage) -> S3Folder:
    return S3Folder("s3://out/deep/run", part=PART, retry=RetryPolicy(tries=3, sleep=lambda seconds: None))


def write(path: Path, size: int, seed: int = 1) -> str:
    """Write a file; returns its SHA-256."""
    path.write_bytes(hashlib.shake_128(bytes([seed])).digest(size))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def requests_of(folder: S3Folder, operation: str) -> list[dict]:
    """Return a list that gets the options of each request of an operation."""
    seen: list[dict] = []
    events = folder._client.meta.events
    events.register(f"provide-client-params.s3.{operation}", lambda params, **_: seen.append(params))
    return seen


@pytest.mark.parametrize("size", [0, 1000, SIZE])
def test_a_file_arrives_once_and_whole(storage, folder, tmp_path, size):
    digest = write(tmp_path / "a", size)
    folder.put_file("c/a", tmp_path / "a", sha256=digest)
    found = storage.get_object(Bucket="out", Key="deep/run/c/a")
    assert found["Body"].read() == (tmp_path / "a").read_bytes()
    assert found["Metadata"] == {"sha256": digest}
    puts = [requests_of(folder, each) for each in ("PutObject", "UploadPart", "CreateMultipartUpload")]
    folder.put_file("c/a", tmp_path / "a", sha256=digest)
    assert puts == [[], [], []]


def test_another_file_of_the_same_size_replaces_it(storage, folder, tmp_path):
    folder.put_file("a", tmp_path / "a", sha256=write(tmp_path / "a", 1000))
    folder.put_file("a", tmp_path / "a", sha256=write(tmp_path / "a", 1000, seed=2))
    assert storage.get_object(Bucket="out", Key="deep/run/a")["Body"].read() == (tmp_path / "a").read_bytes()


def begin(storage, path: Path, *, sha256: str, parts: int) -> None:
    """Begin an upload as a process does that is killed after so many parts."""
    place = {"Bucket": "out", "Key": "deep/run/a"}
    begun = storage.create_multipart_upload(**place, Metadata={"sha256": sha256})
    for number in range(1, parts + 1):
        content = path.read_bytes()[(number - 1) * PART : number * PART]
        storage.upload_part(**place, UploadId=begun["UploadId"], PartNumber=number, Body=content)


def test_an_upload_goes_on_with_the_parts_that_are_missing(storage, folder, tmp_path):
    digest = write(tmp_path / "a", SIZE)
    begin(storage, tmp_path / "a", sha256=digest, parts=2)
    sent = requests_of(folder, "UploadPart")
    folder.put_file("a", tmp_path / "a", sha256=digest)
    assert [params["PartNumber"] for params in sent] == [3]
    assert storage.get_object(Bucket="out", Key="deep/run/a")["Body"].read() == (tmp_path / "a").read_bytes()


def test_parts_of_another_file_are_not_used(storage, folder, tmp_path):
    begin(storage, tmp_path / "a", sha256=write(tmp_path / "a", SIZE, seed=7), parts=2)
    digest = write(tmp_path / "a", SIZE)
    folder.put_file("a", tmp_path / "a", sha256=digest)
    found = storage.get_object(Bucket="out", Key="deep/run/a")
    assert found["Body"].read() == (tmp_path / "a").read_bytes()
    assert found["Metadata"] == {"sha256": digest}


@pytest.mark.parametrize("size", [1000, SIZE])
def test_an_altered_file_gets_no_name_in_the_storage(storage, folder, tmp_path, size):
    digest = write(tmp_path / "a", size, seed=3)
    write(tmp_path / "a", size)
    with pytest.raises(UserError, match="a was altered, and is not uploaded: its SHA-256 is"):
        folder.put_file("a", tmp_path / "a", sha256=digest)
    assert "Contents" not in storage.list_objects_v2(Bucket="out")


def test_an_upload_that_is_stopped_says_so_and_is_gone_on_with(storage, tmp_path):
    digest, stopped = write(tmp_path / "a", SIZE), threading.Event()
    stopped.set()
    with pytest.raises(Interrupted, match="s3://out/a is not whole yet: a later upload goes on with it"):
        S3Folder("s3://out", part=PART, stopped=stopped).put_file("a", tmp_path / "a", sha256=digest)
    S3Folder("s3://out", part=PART).put_file("a", tmp_path / "a", sha256=digest)
    assert storage.head_object(Bucket="out", Key="a")["ContentLength"] == SIZE


def test_what_is_wrong_is_one_line(storage, monkeypatch):
    with pytest.raises(UserError, match="s3://none/x/a: there is no such bucket"):
        S3Folder("s3://none/x").put_text("a", "text")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY: AWS_SECRET_ACCESS_KEY not set"):
        S3Folder("s3://out")


def test_storage_that_cannot_be_reached_is_no_mistake_for_ever(folder, monkeypatch, storage):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached: check the address and the connection"):
        S3Folder("s3://out", retry=RetryPolicy(tries=2, sleep=lambda seconds: None)).put_text("a", "text")
