"""S3-compatible storage for tests: moto's server, with one empty bucket, and keys for it in the environment."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

SECRET = "CanaryOfTheTests"


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Serve storage; yields its address."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def set_keys(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put keys into the environment, and nothing else of AWS. `folder` holds no settings of AWS."""
    for variable in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))


@contextlib.contextmanager
def make_bucket(address: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Any]:
    """Make a bucket, which is empty again at the end; yields a client. `folder` as in `set_keys`."""
    set_keys(monkeypatch, folder)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=name)
    yield client
    for entry in client.list_objects_v2(Bucket=name).get("Contents", ()):
        client.delete_object(Bucket=name, Key=entry["Key"])
    for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
