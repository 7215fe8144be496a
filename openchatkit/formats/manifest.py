"""manifest.json: the size and SHA-256 of every file of a folder, and some facts about the folder.

Stock weight formats have no checksum, so a flipped bit would be loaded and trained on. A writer of shards writes the
manifest last; a reader of shards compares them with it. The manifest holds a digest of itself.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.storage import sha256, write_text

MANIFEST = "manifest.json"
_FORMAT = 1


class DamagedError(UserError):
    """A file that is missing, cut or altered, or a manifest that cannot be read."""


@dataclass(frozen=True)
class FileRecord:
    """A file's name in its folder, its size in bytes and the SHA-256 of its bytes in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The records of a folder's files by name, and its writer's facts `about` it."""

    files: dict[str, FileRecord]
    about: dict[str, Any]


def record(path: Path) -> FileRecord:
    """Return the record of a file as it is on disk now."""
    return FileRecord(path.name, path.stat().st_size, sha256(path))


def write(
    folder: Path, records: Iterable[FileRecord], *, about: Mapping[str, Any] | None = None, name: str = MANIFEST
) -> None:
    """Write a folder's manifest atomically; `about` must be JSON."""
    body = {"format": _FORMAT, "about": dict(about or {}), "files": [asdict(r) for r in records]}
    write_text(folder / name, json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n")


def read(folder: Path, *, name: str = MANIFEST) -> Manifest:
    """Read a folder's manifest; DamagedError when it is missing or altered."""
    try:
        body = json.loads((folder / name).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        if digest != _digest(body) or body["format"] != _FORMAT:
            raise ValueError("the contents do not match their digest")
        return Manifest({r["name"]: FileRecord(**r) for r in body["files"]}, body["about"])
    except FileNotFoundError:
        raise DamagedError(f"{folder / name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / name} is damaged: {error}") from error


def check_sizes(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """DamagedError for the first of `names` (default: all files) that is missing or has another size."""
    for name in manifest.files if names is None else names:
        path, expected = folder / name, _look_up(folder, manifest, name)
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if (found := path.stat().st_size) != expected.size:
            raise DamagedError(
                f"{path} has {found:,} bytes, the manifest says {expected.size:,}: it was cut or replaced"
            )


def verify(folder: Path, names: Iterable[str] | None = None, *, manifest: Manifest | None = None) -> None:
    """Compare the bytes of `names` (default: all files) with the manifest; DamagedError names the first difference."""
    manifest = manifest or read(folder)
    wanted = list(manifest.files if names is None else names)
    check_sizes(folder, manifest, wanted)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda name: check_bytes(folder, manifest.files[name]), wanted):
            pass


def check_bytes(folder: Path, expected: FileRecord) -> None:
    """DamagedError unless the bytes of a file are those of its record."""
    path = folder / expected.name
    if (found := sha256(path)) != expected.sha256:
        raise DamagedError(
            f"{path} was altered: its SHA-256 is {found[:16]}..., the manifest says {expected.sha256[:16]}..."
        )


@contextlib.contextmanager
def advise(what: str) -> Iterator[None]:
    """Add advice to a DamagedError."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}; {what}") from error


def _look_up(folder: Path, manifest: Manifest, name: str) -> FileRecord:
    if name not in manifest.files:
        raise DamagedError(f"{folder / name} is not listed in {MANIFEST}")
    return manifest.files[name]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
