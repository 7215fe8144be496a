"""Uploads to S3-compatible storage (`s3_upload`), by the real client to moto's server."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_storage

from openchatkit.download import s3_upload
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


@pytest.fixture
def begin(storage, monkeypatch):
    """Upload two of the parts of a file, as a process does that is stopped then."""

    def begin_upload(path: Path, *, sha256: str) -> None:
        stopped = threading.Event()
        folder = S3Folder("s3://out/deep/run", part=PART, stopped=stopped)

        def stop(params, **_) -> None:
            if params["PartNumber"] == 2:
                stopped.set()

        folder._client.meta.events.register("provide-client-params.s3.UploadPart", stop)
        with monkeypatch.context() as patched:
            patched.setattr(s3_upload, "_AT_ONCE", 1)
            with pytest.raises(Interrupted, match="a is not whole yet"):
                folder.put_file("a", path, sha256=sha256)

    return begin_upload


def test_an_upload_goes_on_with_the_parts_that_are_missing(storage, folder, tmp_path, begin):
    digest = write(tmp_path / "a", SIZE)
    begin(tmp_path / "a", sha256=digest)
    sent = requests_of(folder, "UploadPart")
    folder.put_file("a", tmp_path / "a", sha256=digest)
    assert [params["PartNumber"] for params in sent] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "the note goes with the need for it"
    assert storage.get_object(Bucket="out", Key="deep/run/a")["Body"].read() == (tmp_path / "a").read_bytes()


def test_an_upload_that_was_begun_for_other_bytes_is_left_alone(storage, folder, tmp_path, begin):
    """Even one whose parts are the same so far: the object would have the SHA-256 of the other bytes."""
    begin(tmp_path / "a", sha256=write(tmp_path / "a", SIZE))
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    completed = requests_of(folder, "CompleteMultipartUpload")
    folder.put_file("a", tmp_path / "a", sha256=digest)
    found = storage.get_object(Bucket="out", Key="deep/run/a")
    assert (found["Body"].read(), found["Metadata"]) == (content, {"sha256": digest})
    assert len(completed) == 1


@pytest.mark.parametrize("lost", ["the upload", "the note"])
def test_what_was_begun_and_is_lost_begins_again(storage, folder, tmp_path, begin, lost):
    digest = write(tmp_path / "a", SIZE)
    begin(tmp_path / "a", sha256=digest)
    if lost == "the note":
        (tmp_path / ".a.upload.json").write_text("{")
    else:
        [upload] = storage.list_multipart_uploads(Bucket="out")["Uploads"]
        storage.abort_multipart_upload(Bucket="out", Key=upload["Key"], UploadId=upload["UploadId"])
    folder.put_file("a", tmp_path / "a", sha256=digest)
    found = storage.get_object(Bucket="out", Key="deep/run/a")
    assert (found["Body"].read(), found["Metadata"]) == ((tmp_path / "a").read_bytes(), {"sha256": digest})


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
