"""Files into S3-compatible storage: large ones in parts, and gone on with where a process before has stopped.

Every request carries the MD5 of its bytes, which the storage compares. An object that is whole has the SHA-256 of its
file in its metadata, so that a file is not sent twice. The metadata of an object that comes in parts is set when the
first is sent, so only an upload that was begun for the same bytes may go on: `.NAME.upload.json` beside the file says
which one that is.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openchatkit.download import s3
from openchatkit.download.retry import RetryPolicy
from openchatkit.errors import Interrupted, UserError
from openchatkit.storage import storage_errors, write_text

T = TypeVar("T")
PART = 64 << 20  # bytes of a part, unless the file has too many of them
_MOST_PARTS = 10_000  # S3's own limit
_AT_ONCE = 4
_SHA256 = "sha256"


class S3Folder:
    """The objects below the `address` s3://bucket/prefix; keys come from the environment (see `s3`).

    `stopped` ends an upload after the parts that are under way, with Interrupted. UserError without keys or boto3.
    """

    def __init__(
        self,
        address: str,
        *,
        retry: RetryPolicy | None = None,
        part: int = PART,
        stopped: threading.Event | None = None,
    ) -> None:
        self.address, self._part, self._retry = address, part, retry or RetryPolicy()
        self._stopped = stopped or threading.Event()
        self._bucket, _, prefix = address.removeprefix(s3.SCHEME).partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client: Any = s3.connect()

    @property
    def storage(self) -> str:
        """The address with that of the storage: the same s3://bucket may be in several."""
        return f"{self.address} at {self._client.meta.endpoint_url}"

    def put_text(self, name: str, text: str) -> None:
        """Write a small object; UserError where the storage refuses it, Interrupted where it keeps failing."""
        self._put(name, text.encode(), {})

    def put_file(self, name: str, path: Path, *, sha256: str) -> None:
        """Upload a file whose SHA-256 is known, unless it is there already; errors as `put_text`.

        UserError for a file that does not have that SHA-256: no object gets its name.
        """
        size = path.stat().st_size
        if self._has(name, size, sha256):
            pass
        elif size <= self._part:
            with storage_errors(path, every=True):
                content = path.read_bytes()
            _check(path, hashlib.sha256(content).hexdigest(), sha256)
            self._put(name, content, {_SHA256: sha256})
        else:
            self._put_parts(name, path, size, sha256)
        with contextlib.suppress(OSError):
            _note_path(path).unlink()

    def _has(self, name: str, size: int, sha256: str) -> bool:
        head = self._request(name, lambda: self._client.head_object(**self._place(name)), may_be_hidden=True) or {}
        return head.get("ContentLength") == size and head.get("Metadata", {}).get(_SHA256) == sha256

    def _put(self, name: str, content: bytes, metadata: dict[str, str]) -> None:
        options = {"Body": content, "ContentMD5": _md5(content), "Metadata": metadata}
        self._request(name, lambda: self._client.put_object(**self._place(name), **options))

    def _begin_or_go_on(self, name: str, path: Path, sha256: str) -> tuple[str, dict[int, tuple[str, int]]]:
        """Return the upload of an object in parts, and those it has: one that was begun for these bytes, or a new one.

        The storage may have dropped what was begun.
        """
        note, target = _note_path(path), {"object": f"{self.storage} {name}", _SHA256: sha256}
        begun = _read_note(note)
        if begun is not None and {**target, "upload": begun.get("upload")} == begun:
            there = self._list_parts(name, begun["upload"])
            if there is not None:
                return begun["upload"], there
        create, metadata = self._client.create_multipart_upload, {_SHA256: sha256}
        upload: str = self._request(name, lambda: create(**self._place(name), Metadata=metadata))["UploadId"]
        with storage_errors(note, every=True):
            write_text(note, json.dumps({**target, "upload": upload}) + "\n")
        return upload, {}

    def _put_parts(self, name: str, path: Path, size: int, sha256: str) -> None:
        upload, there = self._begin_or_go_on(name, path, sha256)
        tags: dict[int, str] = {}
        digest = hashlib.sha256()
        for group in _groups(_parts(path, max(self._part, -(-size // _MOST_PARTS)))):
            if self._stopped.is_set():
                raise Interrupted(f"{self.address}/{name} is not whole yet: a later upload goes on with it")
            for _, content in group:
                digest.update(content)
            missing = []
            for number, content in group:
                if there.get(number) == (hashlib.md5(content, usedforsecurity=False).hexdigest(), len(content)):
                    tags[number] = there[number][0]
                else:
                    missing.append((number, content))
            _do_together([self._sender(name, upload, number, content, tags) for number, content in missing])
        _check(path, digest.hexdigest(), sha256)
        parts = {"Parts": [{"PartNumber": number, "ETag": f'"{tags[number]}"'} for number in sorted(tags)]}
        complete = self._client.complete_multipart_upload
        self._request(name, lambda: complete(**self._place(name), UploadId=upload, MultipartUpload=parts))

    def _sender(self, name: str, upload: str, number: int, content: bytes, tags: dict[int, str]) -> Callable[[], None]:
        options = {"UploadId": upload, "PartNumber": number, "Body": content, "ContentMD5": _md5(content)}

        def send() -> None:
            sent = self._request(name, lambda: self._client.upload_part(**self._place(name), **options))
            tags[number] = sent["ETag"].strip('"')

        return send

    def _list_parts(self, name: str, upload: str) -> dict[int, tuple[str, int]] | None:
        """Return entity tag and size of the parts that an upload has, by their numbers from 1; None without it."""

        def ask() -> dict[int, tuple[str, int]]:
            pages = self._client.get_paginator("list_parts").paginate(**self._place(name), UploadId=upload)
            parts = [part for page in pages for part in page.get("Parts", ())]
            return {part["PartNumber"]: (part["ETag"].strip('"'), part["Size"]) for part in parts}

        return self._request(name, ask, may_be_hidden=True)

    def _request(self, name: str, ask: Callable[[], T], *, may_be_hidden: bool = False) -> T:
        """Return what the storage answers, and ask again while it may help.

        With `may_be_hidden`, None for what is missing, or forbidden, as missing things are where nothing may be listed.
        """
        from botocore.exceptions import ClientError

        address = f"{self.address}/{name}"

        def attempt() -> Any:
            with s3.explain_errors(address, self._client, self._bucket):
                try:
                    return ask()
                except ClientError as error:
                    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                    if may_be_hidden and status in (403, 404):
                        return None
                    raise

        found: T = self._retry.call(attempt, address)
        return found

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}{name}"}


def _note_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.upload.json")


def _read_note(path: Path) -> dict[str, Any] | None:
    """Return what is noted about an upload that was begun; None where nothing of use is."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return noted if isinstance(noted, dict) else None


def _parts(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield a file's parts with their numbers from 1."""
    with storage_errors(path, every=True), open(path, "rb") as file:
        number = 1
        while content := file.read(size):
            yield number, content
            number += 1


def _groups(parts: Iterator[tuple[int, bytes]]) -> Iterator[Sequence[tuple[int, bytes]]]:
    group: list[tuple[int, bytes]] = []
    for part in parts:
        group.append(part)
        if len(group) == _AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _do_together(actions: Sequence[Callable[[], None]]) -> None:
    """Do all actions, each in a thread; raises the first error. A process may end while such threads run."""
    errors: list[Exception] = []

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # raised below, on the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{path} was altered, and is not uploaded: its SHA-256 is {found[:16]}..., not {expected[:16]}..."
        )


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
