"""Objects of S3-compatible storage, by boto3. Keys come from the environment alone.

AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for passing keys, AWS_SESSION_TOKEN; AWS_ENDPOINT_URL for storage that is
not Amazon's; AWS_REGION where it matters.
"""

import base64
import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loguru import logger

from openchatkit.download.digests import MD5, SHA256, Digest
from openchatkit.download.http import retry_after
from openchatkit.download.retry import RetryPolicy, TransientError
from openchatkit.download.transfer import Answer, Remote
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from botocore.client import BaseClient

SCHEME = "s3://"
ID_VARIABLE, SECRET_VARIABLE = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
_PIECE = 1 << 18
_AGAIN = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "InternalError", "ServiceUnavailable")


def remotes(address: str, retry: RetryPolicy, *, sha256: str | None = None) -> list[Remote]:
    """Return the object `s3://bucket/key`, or all objects under a prefix that ends in `/`, named from there on.

    UserError without keys, without boto3, and for an object that is missing or not allowed.
    """
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    if not bucket or not address.startswith(SCHEME):
        raise UserError(f"{address} is not an object: expected s3://bucket/key, or s3://bucket/folder/")
    client = connect()
    if key and not key.endswith("/"):
        found, prefix = [key], key.rfind("/") + 1
    else:
        found, prefix = retry.call(lambda: _keys(client, address, bucket, key), address), len(key)
    # Each with retries of its own: of thousands, some fail at first.
    asks = (functools.partial(_remote, client, bucket, each, each[prefix:], sha256) for each in found)
    return [retry.call(ask, f"{SCHEME}{bucket}/{each}") for ask, each in zip(asks, found, strict=True)]


def _keys(client: "BaseClient", address: str, bucket: str, prefix: str) -> list[str]:
    with explain_errors(address):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    if not (found := [each for each in found if not each.endswith("/")]):
        raise UserError(f"{address} holds no objects: check the bucket and the folder")
    return found


def _remote(client: "BaseClient", bucket: str, key: str, name: str, sha256: str | None) -> Remote:
    address = f"{SCHEME}{bucket}/{key}"
    with explain_errors(address, client, bucket):
        head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    digests = _digests(head)
    if sha256:
        digests = (Digest(SHA256, sha256), *digests)

    @contextlib.contextmanager
    def open_at(start: int, version: str | None) -> Iterator[Answer]:
        options = {"Range": f"bytes={start}-"} if start else {}
        logger.debug("GET {} from byte {}", address, start)
        with explain_errors(address, client, bucket):
            answer = client.get_object(Bucket=bucket, Key=key, IfMatch=version or head["ETag"], **options)
            with contextlib.closing(answer["Body"]) as body:
                first = start if "ContentRange" in answer else 0
                yield Answer(first, head["ContentLength"], head["ETag"], body.iter_chunks(_PIECE))

    return Remote(name, address, open_at, size=head["ContentLength"], version=head["ETag"], digests=digests)


def _digests(head: dict[str, Any]) -> tuple[Digest, ...]:
    """Digests of the whole object: its SHA-256, if the storage keeps it, and its MD5, where that is the entity tag."""
    digests = []
    checksum = head.get("ChecksumSHA256", "")
    # A checksum of the parts' checksums ends in their number.
    if checksum and "-" not in checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        digests.append(Digest(SHA256, base64.b64decode(checksum).hex()))
    tag = head["ETag"].strip('"').lower()
    # With keys of the user's own, or in parts, the entity tag is something else.
    if len(tag) == 32 and head.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in head:
        digests.append(Digest(MD5, tag))
    return tuple(digests)


def connect() -> "BaseClient":
    """Return a client of the storage that the environment names; UserError without keys or without boto3."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise UserError("s3:// needs boto3: pip install 'openchatkit[s3]'") from error
    names = (ID_VARIABLE, SECRET_VARIABLE)
    if absent := [name for name in names if not os.environ.get(name)]:
        raise UserError(f"s3:// needs the environment variables {' and '.join(names)}: {' and '.join(absent)} not set")
    from botocore.exceptions import BotoCoreError

    try:
        return boto3.session.Session(
            aws_access_key_id=os.environ[ID_VARIABLE],
            aws_secret_access_key=os.environ[SECRET_VARIABLE],
            aws_session_token=os.environ.get("AWS_SESSION_TOKEN") or None,
            region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        ).client(
            "s3",
            # Retries and digests are up to the loop: a digest is of a whole file, however often it was resumed.
            config=Config(
                retries={"total_max_attempts": 1, "mode": "standard"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                connect_timeout=10,
                read_timeout=60,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"s3:// cannot be set up: {error}: check AWS_ENDPOINT_URL and AWS_REGION") from error


@contextlib.contextmanager
def explain_errors(address: str, client: "BaseClient | None" = None, bucket: str = "") -> Iterator[None]:
    """Turn errors of boto3 about `address` into UserError or TransientError."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        raise _explain(error, address, client, bucket) from error
    except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError) as error:
        raise TransientError("cannot be reached", unreachable=True) from error
    except (exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
        raise TransientError(f"the connection broke ({type(error).__name__})") from error
    except (exceptions.BotoCoreError, ValueError) as error:
        raise UserError(f"{address}: {error}: check the address, AWS_ENDPOINT_URL and AWS_REGION") from error


def _explain(error: Any, address: str, client: "BaseClient | None", bucket: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    metadata = error.response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    if status in (412, 416):
        return TransientError("the object was changed while it was fetched", restart=True)
    if status == 429 or status >= 500 or code in _AGAIN:
        wait = retry_after({"Retry-After": metadata.get("HTTPHeaders", {}).get("retry-after", "")})
        return TransientError(f"the storage answers {status} {code}".rstrip(), wait=wait)
    if code in ("NoSuchBucket",) or (status == 404 and client is not None and not _bucket_exists(client, bucket)):
        says = "there is no such bucket: check the address and AWS_ENDPOINT_URL"
    elif status == 404:
        says = "there is no such object: check the key; a folder ends in /"
    elif status in (401, 403):
        what = code if code not in ("403", "401") else "AccessDenied"
        says = f"the storage refuses ({what}): check {ID_VARIABLE}, {SECRET_VARIABLE} and what they may do there"
    else:
        says = f"the storage answers {status} {code}: check the address, AWS_ENDPOINT_URL and AWS_REGION"
    return UserError(f"{address}: {says}")


def _bucket_exists(client: "BaseClient", bucket: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        # Without permission to look, it may still exist.
        response = getattr(error, "response", {})
        return bool(response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404)
    return True
