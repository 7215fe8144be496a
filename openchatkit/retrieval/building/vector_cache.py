"""Vectors by the digest of their text: those of the current index, and those that a killed run has embedded.

Vectors are appended, as float16, to a file of this process in the partial folder of the index, then their digests to
another file: a vector counts once its digest is there. So a kill loses only the texts in the current batch.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from openchatkit import storage
from openchatkit.formats.retrieval_index import EncoderRecord

SIZE = 16  # bytes of a digest
KEYS = np.dtype(f"S{SIZE}")  # equal if and only if the digests are, even with trailing zero bytes
_VECTORS = np.dtype("<f2")
_ABOUT = "about.json"


def text_digest(text: str) -> bytes:
    """Return the key for the vector of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:SIZE]


def as_keys(digests: Iterator[bytes], count: int) -> np.ndarray:
    """Return `count` digests as an array of `KEYS`."""
    return np.fromiter(digests, KEYS, count)


class KnownVectors:
    """Existing vectors, looked up by digest."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._parts: list[np.ndarray] = []  # float16 [n, dimension], most of them memory maps
        self._keys = np.empty(0, KEYS)  # sorted
        self._rows = np.empty(0, np.int64)  # their rows in all parts concatenated

    def add(self, found: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors [n, dimension] and their n digests."""
        assert vectors.shape == (len(found), self._dimension), (vectors.shape, len(found), self._dimension)
        rows = np.arange(len(found)) + sum(map(len, self._parts))
        self._parts.append(vectors)
        together = np.concatenate([self._keys, found])
        self._keys, first = np.unique(together, return_index=True)
        self._rows = np.concatenate([self._rows, rows])[first]

    def locate(self, wanted: np.ndarray) -> np.ndarray:
        """Return the row of each digest, -1 if unknown."""
        if not len(self._keys):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._rows[at], -1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these rows: float16 [n, dimension]."""
        assert len(rows) == 0 or rows.min() >= 0, "a passage without a vector"
        taken = np.empty((len(rows), self._dimension), _VECTORS)
        first = 0
        for part in self._parts:
            here = (rows >= first) & (rows < first + len(part))
            taken[here] = part[rows[here] - first]
            first += len(part)
        return taken


def start(folder: Path, encoder: EncoderRecord) -> None:
    """Prepare the partial folder for this encoder; remove vectors of another encoder or length of texts."""
    about = json.dumps({"digest": encoder.digest, "dimension": encoder.dimension, "max_tokens": encoder.max_tokens})
    with contextlib.suppress(OSError):
        if (folder / _ABOUT).read_text(encoding="utf-8") == about:
            return
    shutil.rmtree(folder, ignore_errors=True)
    storage.write_text(folder / _ABOUT, about)


def holds_any(folder: Path) -> bool:
    """Whether a process has begun to write vectors here."""
    return any(folder.glob("keys-*.bin"))


def read_parts(folder: Path, dimension: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (digests, vectors) that processes have written, as far as both are complete."""
    for path in sorted(folder.glob("keys-*.bin")):
        vectors = path.with_name(path.name.replace("keys", "vectors"))
        count = _count_complete(path, vectors, dimension)
        if count:
            yield (np.fromfile(path, KEYS, count), np.memmap(vectors, _VECTORS, "r", shape=(count, dimension)))


class VectorWriter:
    """A context manager that appends to the files of one process, after their complete entries."""

    def __init__(self, folder: Path, rank: int, dimension: int) -> None:
        keys_path, vectors_path = folder / f"keys-{rank}.bin", folder / f"vectors-{rank}.bin"
        count = _count_complete(keys_path, vectors_path, dimension)
        self._keys = open(keys_path, "ab")  # noqa: SIM115 (closed by `__exit__`)
        self._vectors = open(vectors_path, "ab")  # noqa: SIM115 (as above)
        self._keys.truncate(count * SIZE)
        self._vectors.truncate(count * dimension * _VECTORS.itemsize)

    def add(self, digests: Sequence[bytes], vectors: np.ndarray) -> None:
        """Append vectors float32 [n, dimension]. A digest never reaches the disk before its vector."""
        with np.errstate(over="ignore"):  # infinite numbers are refused when the index is written
            self._vectors.write(vectors.astype(_VECTORS).tobytes())
        storage.sync_file(self._vectors)
        self._keys.write(b"".join(digests))
        self._keys.flush()

    def __enter__(self) -> "VectorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._vectors.close()
        self._keys.close()


def _count_complete(keys_path: Path, vectors_path: Path, dimension: int) -> int:
    try:
        sizes = keys_path.stat().st_size // SIZE, vectors_path.stat().st_size // (dimension * _VECTORS.itemsize)
    except FileNotFoundError:
        return 0
    return min(sizes)
