"""Digests that servers give of a file, and the comparison of a file's bytes with them."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from openchatkit import progress

SHA256, MD5, GIT = "sha256", "md5", "git-sha1"  # GIT is git's name of a blob: the SHA-1 of its size and its bytes
_HEX_LENGTHS = {SHA256: 64, MD5: 32, GIT: 40}


@dataclass(frozen=True)
class Digest:
    """A digest in lower-case hexadecimal, of one of the kinds above."""

    kind: str
    value: str

    def __post_init__(self) -> None:
        assert len(self.value) == _HEX_LENGTHS[self.kind], self

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"


def mismatch(path: Path, expected: Collection[Digest], description: str) -> tuple[Digest, Digest] | None:
    """Return the first digest that `path` does not have, and the one it has instead; None when it has all."""
    if not expected:
        return None
    found = _digests(path, {digest.kind for digest in expected}, description)
    for digest in expected:
        if found[digest.kind] != digest:
            return digest, found[digest.kind]
    return None


def _digests(path: Path, kinds: Collection[str], description: str) -> dict[str, Digest]:
    size = path.stat().st_size
    hashes = {kind: _hash(kind, size) for kind in kinds}
    buffer = bytearray(1 << 20)
    with open(path, "rb") as file, progress.bar(size, description, unit="B", unit_scale=True, leave=False) as bar:
        while length := file.readinto(buffer):
            for each in hashes.values():
                each.update(memoryview(buffer)[:length])
            bar.update(length)
    return {kind: Digest(kind, each.hexdigest()) for kind, each in hashes.items()}


def _hash(kind: str, size: int) -> "hashlib._Hash":
    if kind == GIT:
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(kind, usedforsecurity=False)
