"""Files behind http and https addresses: ranges, validators, and what each status means."""

import base64
import binascii
import contextlib
import datetime
import email.utils
import hashlib
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from loguru import logger

from openchatkit.download.digests import SHA256, Digest
from openchatkit.download.retry import TransientError
from openchatkit.download.transfer import Answer, Remote
from openchatkit.errors import UserError
from openchatkit.texts import reason_of

if TYPE_CHECKING:
    import httpx2

_TIMEOUT_SECONDS = 60.0
_AGAIN = (408, 425, 429)  # and 500 to 599: refused now, perhaps not later


def remote(address: str, *, sha256: str | None = None, name: str | None = None) -> Remote:
    """Return the file at an address, stored under `name` or the last part of the address."""
    url = _split(address)
    if url.username is not None or url.password is not None:
        raise UserError(
            f"{redact(address)}: the address holds a user or a password, which does not belong on a command line: "
            "fetch the file with a program that can log in and pass its path"
        )
    name = name or urllib.parse.unquote(url.path.rsplit("/", 1)[-1])
    if not url.hostname or not name or name.startswith(".") or "/" in name:
        raise UserError(f"{redact(address)} names no file: expected https://host/folder/file.jsonl")
    digests = (Digest(SHA256, sha256),) if sha256 else ()

    def open_at(start: int, version: str | None) -> contextlib.AbstractContextManager[Answer]:
        return open_url(address, start, version)

    return Remote(name, _identity(address), open_at, digests=digests)


def redact(address: str) -> str:
    """Return an address for printing: without user, password, query and fragment."""
    url = _split(address)
    host = url.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((url.scheme, host, url.path, "", ""))


def _split(address: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(address)
    except ValueError as error:
        # Not shown: it may hold a secret anywhere.
        raise UserError(f"not a valid URL ({error}): expected https://host/folder/file.jsonl") from error


def _identity(address: str) -> str:
    """Return an address for messages and sidecars, with only a digest of its query, which may be a signature."""
    query = _split(address).query
    return redact(address) + (f"?({hashlib.sha256(query.encode()).hexdigest()[:8]})" if query else "")


@contextlib.contextmanager
def open_url(
    address: str,
    start: int,
    version: str | None,
    *,
    headers: Mapping[str, str] | None = None,
    on_refusal: Callable[["httpx2.Response"], None] = lambda response: None,
) -> Iterator[Answer]:
    """Ask for the bytes of a file from `start` on; `version`, if it is an entity tag or a date, must still hold.

    `headers` go to the address's own host alone. `on_refusal` gets an answer of 401, 403 or 404 first and may raise.
    TransientError, here or from the pieces, for errors that another try may not meet; UserError for the rest.
    """
    import httpx2

    # As stored, not as compressed for transport: sizes, ranges and digests are of the file.
    asked = {"Accept-Encoding": "identity", "User-Agent": "openchatkit", **(headers or {})}
    if start:
        asked["Range"] = f"bytes={start}-"
        if version:
            asked["If-Range"] = version
    logger.debug("GET {} from byte {}", redact(address), start)
    try:
        with (
            connection() as client,
            client.stream("GET", address, headers=asked) as response,
        ):
            if response.status_code in (401, 403, 404):
                on_refusal(response)
            yield _answer(response, address, start)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise TransientError(f"cannot be reached ({reason_of(error)})", unreachable=True) from error
    except httpx2.TimeoutException as error:
        raise TransientError(f"nothing came for {_TIMEOUT_SECONDS:.0f} seconds") from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.TooManyRedirects, UnicodeError) as error:
        raise UserError(f"{redact(address)}: {reason_of(error)}: check the address") from error
    except httpx2.TransportError as error:
        raise TransientError(f"the connection broke ({reason_of(error)})") from error


def connection() -> "httpx2.Client":
    """Return a client that follows redirects; UserError when the environment's proxies or certificates are wrong."""
    import httpx2

    try:
        return httpx2.Client(follow_redirects=True, timeout=_TIMEOUT_SECONDS)
    except ImportError as error:
        raise UserError("a SOCKS proxy needs socksio: pip install socksio") from error
    except OSError as error:
        says = f"SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({reason_of(error)}): correct or unset it"
        raise UserError(says) from error
    except (ValueError, httpx2.InvalidURL) as error:
        # The reason is not shown: it may quote a part of a password.
        raise UserError("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not an address: expected http://host:port") from error


def _answer(response: "httpx2.Response", address: str, start: int) -> Answer:
    status = response.status_code
    if status == 416:
        # Nothing follows the last byte, so the bytes here are the whole file, or not of this file.
        size = _content_range(response)[1]
        if size != start:
            raise TransientError(f"the server has no byte {start}", restart=True)
        return Answer(start, size, None, iter(()), _digests(response))
    if status in _AGAIN or status >= 500:
        raise TransientError(f"the server answers {_status(response)}", wait=retry_after(response.headers))
    if status not in (200, 206):
        advice = "check the address"
        if status in (401, 403):
            advice = "it is not public, or the address has expired: fetch it with a program that can log in"
        raise UserError(f"{redact(address)}: the server answers {_status(response)}: {advice}")
    _check_kind(response, address)
    first, size = _content_range(response) if status == 206 else (0, _length(response))
    if first is None:
        raise TransientError("the server sends a range and does not say which", restart=True)
    return Answer(first, size, _version(response), response.iter_raw(), _digests(response))


def _status(response: "httpx2.Response") -> str:
    return f"{response.status_code} {response.reason_phrase}".strip()


def _check_kind(response: "httpx2.Response", address: str) -> None:
    """UserError for an answer that is plainly not the file: a login page, or a body compressed unasked."""
    path = urllib.parse.urlsplit(address).path.lower()
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind == "text/html" and not path.endswith((".html", ".htm")):
        raise UserError(f"{redact(address)}: the server answers with a web page, not with the file: check the address")
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if coding not in ("identity", "") and not path.endswith((".gz", ".tgz", ".zst")):
        raise UserError(
            f"{redact(address)}: the server sends the file as {coding}, unasked: fetch it with another program"
        )


def _length(response: "httpx2.Response") -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _content_range(response: "httpx2.Response") -> tuple[int | None, int | None]:
    """(first byte, size of the whole file) of `bytes 5-9/10`, `bytes 5-9/*` or `bytes */10`."""
    match = re.fullmatch(
        r"bytes (?:(\d{1,18})-\d+|\*)/(?:(\d{1,18})|\*)", response.headers.get("Content-Range", "").strip()
    )
    first, size = match.groups() if match else (None, None)
    return (int(first) if first else None), (int(size) if size else None)


def _version(response: "httpx2.Response") -> str | None:
    """The validator that If-Range takes (RFC 9110, 13.1.5): a strong entity tag, else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') and tag.isascii() else response.headers.get("Last-Modified")


def _digests(response: "httpx2.Response") -> tuple[Digest, ...]:
    """The SHA-256 of the whole file from Repr-Digest (RFC 9530), if the server sends it."""
    match = re.search(r"(?:^|,)\s*sha-256=:([^:]*):", response.headers.get("Repr-Digest", ""))
    try:
        value = base64.b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        value = b""
    return (Digest(SHA256, value.hex()),) if len(value) == 32 else ()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that Retry-After asks for, which may be a number or a date."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (until - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
