"""`training/uploads.py`: a run's checkpoints arrive whole in storage, and leave the disk only after that."""

import errno
import hashlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
import s3_storage
from hub_server import serving
from test_layouts import run
from tiny_shards import flip, write_checkpoint

from openchatkit.distributed.layout import Layout
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats import checkpoint, checkpoint_folders, manifest
from openchatkit.training.soundness import Soundness
from openchatkit.training.uploads import Uploader, check_upload, finish_uploads

PREFIX = "s3://out/deep/run"


@pytest.fixture(scope="module")
def address():
    with s3_storage.serve() as address:
        yield address


@pytest.fixture
def storage(address, monkeypatch, tmp_path):
    """A client of storage with an empty bucket `out`, and keys for it in the environment."""
    with s3_storage.make_bucket(address, "out", monkeypatch, tmp_path) as client:
        yield client


@pytest.fixture
def root(tmp_path):
    """A run's folder with the checkpoints 5 and 10."""
    for step in (5, 10):
        write_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.fixture
def start():
    """Start uploads of a folder; they are stopped at the end."""
    started: list[Uploader] = []

    def start(root: Path) -> Uploader:
        started.append(Uploader(root, PREFIX))
        started[-1].wake()
        return started[-1]

    yield start
    for each in started:
        each.close()


def keys(storage) -> list[str]:
    """The names of all objects, from the one that was written first."""
    found = storage.list_objects_v2(Bucket="out").get("Contents", ())
    return [entry["Key"].removeprefix("deep/run/") for entry in sorted(found, key=lambda entry: entry["LastModified"])]


def assert_whole_in_storage(storage, path: Path) -> None:
    """Every file of a checkpoint, its manifest included, is in the storage byte for byte."""
    names = [*manifest.read(path).files, manifest.MANIFEST]
    assert set(names) == {key.split("/")[1] for key in keys(storage) if key.startswith(f"{path.name}/")}
    for name in names:
        found = storage.get_object(Bucket="out", Key=f"deep/run/{path.name}/{name}")["Body"].read()
        assert hashlib.sha256(found).digest() == hashlib.sha256((path / name).read_bytes()).digest(), name


def test_all_checkpoints_arrive_and_are_noted(storage, root, start):
    uploader = start(root)
    assert uploader.wait(60)
    for step in (5, 10):
        assert_whole_in_storage(storage, root / f"checkpoint_{step}")
    assert storage.get_object(Bucket="out", Key="deep/run/latest")["Body"].read() == b"10\n"
    assert checkpoint.list_to_upload(root, uploader.storage) == []
    assert checkpoint.list_to_upload(root, "s3://other") == [root / "checkpoint_5", root / "checkpoint_10"]
    checkpoint.verify(root / "checkpoint_5")
    write_checkpoint(root, 15)
    uploader.wake()
    assert uploader.wait(60)
    assert_whole_in_storage(storage, root / "checkpoint_15")


def test_a_step_that_is_saved_again_beside_its_upload_is_uploaded_again(storage, root, start, monkeypatch):
    mark, again = checkpoint.mark_uploaded, []

    def save_again_and_mark(path, prefix, uploaded):
        if path == root / "checkpoint_5" and not again:
            again.append(path)
            write_checkpoint(root, 5, optimizer=False)
        mark(path, prefix, uploaded)

    monkeypatch.setattr(checkpoint, "mark_uploaded", save_again_and_mark)
    uploader = start(root)
    assert uploader.wait(60)
    assert checkpoint.list_to_upload(root, uploader.storage) == again == [root / "checkpoint_5"]
    assert checkpoint.prune(root, 1, verified=root / "checkpoint_10", uploads_to=uploader.storage) == []
    uploader.wake()
    assert uploader.wait(60)
    found = storage.get_object(Bucket="out", Key=f"deep/run/checkpoint_5/{manifest.MANIFEST}")["Body"].read()
    assert found == (root / "checkpoint_5" / manifest.MANIFEST).read_bytes()
    assert checkpoint.prune(root, 1, verified=root / "checkpoint_10", uploads_to=uploader.storage) == again


def test_a_damaged_checkpoint_is_kept_here_and_hinders_no_other(storage, root, start):
    flip(root / "checkpoint_5" / "head.safetensors")
    uploader = start(root)
    with pytest.raises(UserError, match=r"head\.safetensors was altered, and is not uploaded: .* are whole in"):
        uploader.wait(60)
    assert_whole_in_storage(storage, root / "checkpoint_10")
    assert f"checkpoint_5/{manifest.MANIFEST}" not in keys(storage)
    assert checkpoint.list_to_upload(root, uploader.storage) == [root / "checkpoint_5"]


def test_latest_names_the_newest_of_those_that_a_run_would_go_on_from(storage, root, start):
    def read_latest() -> bytes:
        return storage.get_object(Bucket="out", Key="deep/run/latest")["Body"].read()

    good = (root / "checkpoint_5" / "head.safetensors").read_bytes()
    flip(root / "checkpoint_5" / "head.safetensors")
    uploader = start(root)
    with pytest.raises(UserError, match="was altered"):
        uploader.wait(60)
    (root / "checkpoint_5" / "head.safetensors").write_bytes(good)
    uploader.wake()
    assert uploader.wait(60)
    assert_whole_in_storage(storage, root / "checkpoint_5")
    assert read_latest() == b"10\n", "5 came later, and is older"
    write_checkpoint(root, 20)
    uploader.wake()
    assert uploader.wait(60)
    assert read_latest() == b"20\n"
    checkpoint.point_to(root, 10)  # as a run does that goes back
    uploader.settle_latest()
    assert read_latest() == b"10\n"
    checkpoint.point_to(root, 5)  # as a user does; there is nothing to upload
    assert start(root).wait(60)
    assert read_latest() == b"5\n"
    write_checkpoint(root, 15)
    uploader.wake()
    assert uploader.wait(60)
    assert read_latest() == b"15\n"


def test_a_run_that_has_saved_nothing_yet_has_no_latest_in_the_storage(storage, tmp_path, start):
    """Neither while it waits for its first checkpoint, nor where a mistake ends it before."""
    uploader = start(tmp_path)
    finish_uploads(uploader, Layout(0, "cpu"), [])
    uploader.settle_latest()
    assert keys(storage) == []


def test_what_is_in_one_storage_is_not_taken_for_being_in_another(storage, root, start, monkeypatch):
    uploader = start(root)
    assert uploader.wait(60)
    with s3_storage.serve() as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", other)
        elsewhere = Uploader(root, PREFIX)
        assert checkpoint.list_to_upload(root, elsewhere.storage) == [root / "checkpoint_5", root / "checkpoint_10"]
        elsewhere.close()


def test_what_the_storage_refuses_is_tried_again(storage, root, start):
    storage.delete_bucket(Bucket="out")
    uploader = start(root)
    with pytest.raises(UserError, match="there is no such bucket"):
        uploader.wait(60)
    storage.create_bucket(Bucket="out")
    uploader.wake()
    assert uploader.wait(60)
    assert_whole_in_storage(storage, root / "checkpoint_10")


def test_a_folder_that_cannot_be_listed_ends_the_wait_for_uploads(storage, root, start, monkeypatch):
    def fail(*_):
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(checkpoint, "list_to_upload", fail)
    uploader = start(root)
    with pytest.raises(UserError, match=f"{root}: the folder of another machine is gone or was replaced"):
        uploader.wait(60)
    monkeypatch.undo()
    assert checkpoint.list_to_upload(root, uploader.storage) == [root / "checkpoint_5", root / "checkpoint_10"]


def test_a_request_to_stop_does_not_wait_for_uploads(storage, root, start, monkeypatch):
    held = threading.Event()
    upload = Uploader._upload
    monkeypatch.setattr(Uploader, "_upload", lambda self, path: held.wait(60) and upload(self, path))
    uploader = start(root)
    with pytest.raises(Interrupted, match="stopped before all checkpoints were uploaded: the same command uploads"):
        finish_uploads(uploader, Layout(0, "cpu"), [15])
    held.set()
    finish_uploads(uploader, Layout(0, "cpu"), [])
    assert checkpoint.list_to_upload(root, uploader.storage) == []


def test_a_prefix_without_keys_or_bucket_ends_before_training(storage, monkeypatch):
    with pytest.raises(UserError, match=r"-upload-prefix: s3://none/x/config\.json: there is no such bucket"):
        check_upload("s3://none/x", "{}")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"--checkpoint-upload-prefix: s3:// needs .*: AWS_SECRET_ACCESS_KEY not set"):
        check_upload(PREFIX, "{}")


def test_storage_that_is_busy_is_no_mistake_in_the_flags(storage, monkeypatch):
    with serving() as busy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", busy.address)
        with pytest.raises(Interrupted, match=r"-upload-prefix: .*: the storage answers 503 .*3600 seconds"):
            check_upload(PREFIX, "{}")


def test_a_run_keeps_what_is_not_uploaded_and_ends_when_all_is(tmp_path, flags, storage):
    flags = {**flags, "total_steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 1}
    before = run(tmp_path, flags, total_steps=2)
    storage.delete_bucket(Bucket="out")
    storage.create_bucket(Bucket="out")
    keys_of_storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    path = run(tmp_path, flags, environment=keys_of_storage, checkpoint_upload_prefix=PREFIX)
    assert checkpoint.list_steps(path.parent) == [5, 6]
    assert checkpoint.is_uploaded(path, f"{PREFIX} at {os.environ['AWS_ENDPOINT_URL']}")
    assert_whole_in_storage(storage, path)
    uploaded = {key.split("/")[0] for key in keys(storage) if key.endswith(manifest.MANIFEST)}
    assert {"checkpoint_3", "checkpoint_4", "checkpoint_5", "checkpoint_6", before.name} <= uploaded
    for key in list(keys(storage)):
        storage.delete_object(Bucket="out", Key=f"deep/run/{key}")
    (path / checkpoint_folders.UPLOADED).unlink()
    run(tmp_path, flags, environment=keys_of_storage, checkpoint_upload_prefix=PREFIX)  # all steps are done: it uploads
    assert_whole_in_storage(storage, path)
    storage.delete_object(Bucket="out", Key="deep/run/config.json")


@dataclass(frozen=True)
class GoBackAfterUpload:
    """Let a run go back no sooner than a checkpoint is uploaded."""

    path: Path

    def __call__(self) -> None:
        go_back = Soundness.go_back

        def wait_and_go_back(soundness: Soundness) -> str:
            limit = time.monotonic() + 60
            while not (self.path / checkpoint_folders.UPLOADED).exists() and time.monotonic() < limit:
                time.sleep(0.02)
            return go_back(soundness)

        Soundness.go_back = wait_and_go_back


def test_latest_in_the_storage_goes_back_with_a_run_that_diverged(tmp_path, flags, storage):
    root = tmp_path / "ckpt"
    flags = {**flags, "checkpoint_path": root, "checkpoint_steps": 1, "checkpoint_upload_prefix": PREFIX}
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert ranks.train(tmp_path, {**flags, "total_steps": 6}, environment=environment).statuses == [0]
    diverge = {**flags, "total_steps": 40, "lr": 1e30}
    ended = ranks.train(
        tmp_path, diverge, environment=environment, before_main=GoBackAfterUpload(root / "checkpoint_7")
    )
    assert ended.statuses == [2]
    assert checkpoint.latest(root) == root / "checkpoint_6"
    assert_whole_in_storage(storage, root / "checkpoint_7")
    assert storage.get_object(Bucket="out", Key="deep/run/latest")["Body"].read() == b"6\n"


def test_a_run_without_keys_is_one_line(tmp_path, flags):
    flags = {**flags, "checkpoint_path": tmp_path / "ckpt", "checkpoint_upload_prefix": PREFIX}
    ended = ranks.train(tmp_path, flags, environment={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "x"})
    assert ended.statuses == [2]
    assert "AWS_ACCESS_KEY_ID not set" in ended.errors[0]
    assert not (tmp_path / "ckpt").exists()
