"""The stored vectors of an index: float16, one row a passage, one file read by memory map.

The faiss index, and the exact order of its candidates, are computed from these.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from openchatkit.errors import UserError

COSINE, DOT = "cosine", "dot"
_DTYPE = np.dtype("<f2")
_PIECE = 1 << 14  # rows converted at a time


def write(path: Path, parts: Iterable[np.ndarray], *, rows: int, dimension: int, metric: str) -> None:
    """Write parts [any, dimension] of floats one after another; for `cosine`, each row is scaled to length 1.

    UserError: a part has another dimension, a number that is not finite (or too large for float16) or, for `cosine`, a
    row of zeros; there are not `rows` rows.
    """
    done = 0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": _DTYPE.str, "fortran_order": False, "shape": (rows, dimension)}
        )
        for part in split_rows(parts):
            file.write(prepare(part, dimension, metric, first=done).astype(_DTYPE).tobytes())
            done += len(part)
    if done != rows:
        raise UserError(f"{rows:,} passages but {done:,} vectors: expected one for each")


def prepare(part: np.ndarray, dimension: int, metric: str, *, first: int = 0) -> np.ndarray:
    """Return vectors [n, dimension] as they are compared: float32, checked, at length 1 for `cosine`.

    `first` is the number of the first vector, for messages.
    """
    part = np.asarray(part, dtype=np.float32)
    if part.ndim != 2 or part.shape[1] != dimension:
        raise UserError(f"vectors have the shape {part.shape}, the index has {dimension} numbers a vector")
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(part.astype(_DTYPE)).all(axis=1)
    if metric == COSINE:
        with np.errstate(invalid="ignore", over="ignore"):
            lengths = np.linalg.norm(part, axis=1, keepdims=True)
        bad |= lengths[:, 0] == 0
    if bad.any():
        number = first + int(np.argmax(bad))
        raise UserError(
            f"vector {number:,} has numbers that are not finite, or no length: expected numbers within float16; "
            "look at that passage and at the encoder"
        )
    return part / lengths if metric == COSINE else part


def open_array(path: Path, *, rows: int, dimension: int) -> np.ndarray:
    """Open float16 [rows, dimension], read-only, by memory map; UserError: the file is of another kind."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}; build the index again") from error
    if array.shape != (rows, dimension) or array.dtype != _DTYPE:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, the manifest says {_DTYPE} {(rows, dimension)}: "
            "build the index again"
        )
    return np.asarray(array)  # the plain array spares every slice the cost of np.memmap's own class


def split_rows(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the rows of parts, at most 16,384 at a time, so that memory does not grow with a memory map."""
    for part in parts:
        for first in range(0, len(part), _PIECE):
            yield part[first : first + _PIECE]


def inner_products(vectors: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the inner products of a query float32 [d] with these rows: float32 [n]."""
    return vectors[rows].astype(np.float32) @ query


def search_exactly(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows of greatest inner product for each query float32 [n, d]: scores [n, k], row numbers [n, k].

    Compares all rows; `k` is at most their number. Approximate search is measured against this.
    """
    assert k <= len(vectors), (k, len(vectors))
    best = np.full((len(queries), 0), 0, np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for first in range(0, len(vectors), _PIECE):
        products = queries @ vectors[first : first + _PIECE].astype(np.float32).T
        best = np.concatenate([best, products], axis=1)
        here = np.arange(first, first + products.shape[1])
        rows = np.concatenate([rows, np.broadcast_to(here, products.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k] if len(here) <= k else _top_columns(best, k)
        best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return best, rows


def _top_columns(values: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k greatest values of each row, the greatest first."""
    some = np.argpartition(-values, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
