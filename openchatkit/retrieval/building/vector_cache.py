"""Vectors by what they were made from: those of the index before, and those that a run that died has made.

What is embedded is appended, as float16, to a file of this process in the index's partial folder, then its digests to
another: a vector counts when its digest is there. So a kill loses the texts that were in the network, and no others.
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
KEYS = np.dtype(f"S{SIZE}")  # two digests are equal if and only if these are: zero bytes at the end are not lost
_VECTORS = np.dtype("<f2")
_ABOUT = "about.json"


def text_digest(text: str) -> bytes:
    """What names the vector of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:SIZE]


def as_keys(digests: Iterator[bytes], count: int) -> np.ndarray:
    """So many digests as an array of `KEYS`."""
    return np.fromiter(digests, KEYS, count)


class KnownVectors:
    """Vectors that are there, to be looked up by digest."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._parts: list[np.ndarray] = []  # float16 [n, dimension], most of them memory maps
        self._keys = np.empty(0, KEYS)  # sorted
        self._rows = np.empty(0, np.int64)  # the rows that they name, in all parts one after another

    def add(self, found: np.ndarray, vectors: np.ndarray) -> None:
        """Take in vectors [n, dimension] and their n digests."""
        assert vectors.shape == (len(found), self._dimension), (vectors.shape, len(found), self._dimension)
        rows = np.arange(len(found)) + sum(map(len, self._parts))
        self._parts.append(vectors)
        together = np.concatenate([self._keys, found])
        self._keys, first = np.unique(together, return_index=True)
        self._rows = np.concatenate([self._rows, rows])[first]

    def locate(self, wanted: np.ndarray) -> np.ndarray:
        """The row of each digest, -1 where there is none."""
        if not len(self._keys):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, self._rows[at], -1)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows: float16 [n, dimension]."""
        assert len(rows) == 0 or rows.min() >= 0, "a passage without a vector"
        taken = np.empty((len(rows), self._dimension), _VECTORS)
        first = 0
        for part in self._parts:
            here = (rows >= first) & (rows < first + len(part))
            taken[here] = part[rows[here] - first]
            first += len(part)
        return taken


def start(folder: Path, encoder: EncoderRecord) -> None:
    """Make the partial folder one of this encoder's; vectors of another, or of another length of texts, go."""
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
    """(digests, vectors) that processes have written, as far as both are whole."""
    for path in sorted(folder.glob("keys-*.bin")):
        vectors = path.with_name(path.name.replace("keys", "vectors"))
        count = _whole(path, vectors, dimension)
        if count:
            yield (
                np.fromfile(path, KEYS, count),
                np.memmap(vectors, _VECTORS, "r", shape=(count, dimension)),
            )


class VectorWriter:
    """A context manager that appends to the files of one process, behind what is whole of them."""

    def __init__(self, folder: Path, rank: int, dimension: int) -> None:
        keys_path, vectors_path = folder / f"keys-{rank}.bin", folder / f"vectors-{rank}.bin"
        count = _whole(keys_path, vectors_path, dimension)
        self._keys = open(keys_path, "ab")  # noqa: SIM115 (closed by `__exit__`)
        self._vectors = open(vectors_path, "ab")  # noqa: SIM115 (as above)
        self._keys.truncate(count * SIZE)
        self._vectors.truncate(count * dimension * _VECTORS.itemsize)

    def add(self, digests: Sequence[bytes], vectors: np.ndarray) -> None:
        """Append vectors float32 [n, dimension]. A digest never reaches the disk before its vector."""
        with np.errstate(over="ignore"):  # who writes the index refuses what has become infinite
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


def _whole(keys_path: Path, vectors_path: Path, dimension: int) -> int:
    try:
        sizes = keys_path.stat().st_size // SIZE, vectors_path.stat().st_size // (dimension * _VECTORS.itemsize)
    except FileNotFoundError:
        return 0
    return min(sizes)
