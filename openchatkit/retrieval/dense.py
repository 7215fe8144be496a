"""Searching vectors with faiss: which index is built for how many rows, and which files are accepted.

Up to 50,000 rows, all are compared, as float16. Above that, rows are in lists by their nearest centre (IVF) and only
some lists are searched, as bytes (or, from 20 million rows on, as product-quantised codes); the candidates found are
then scored by the stored vectors. How many lists to search is measured when the index is built. Files are read by
memory map.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from loguru import logger

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats.retrieval_index import DenseRecord
from openchatkit.libraries import faiss_files
from openchatkit.retrieval import vector_store

FLAT, LISTS, CODES = "IndexScalarQuantizer", "IndexIVFScalarQuantizer", "IndexIVFPQ"
MAX_FLAT = 50_000  # rows; one core compares these, of 384 numbers, in 1 to 2 ms
_MIN_CODES = 20_000_000  # rows
RECALL = 0.97
_MIN_CANDIDATES = 100
_SAMPLE = 200  # vectors for measuring the search
_NEARNESS = 0.7  # their cosine to a row: with MiniLM, that of a question to its answer
_TRAINED_ON = 40  # rows a list
_PIECE = 1 << 14  # rows added at a time
_MOST_ON_GPUS = 2048  # lists that faiss searches there, and rows that it finds
_SCRATCH = 1 << 28  # bytes of a GPU for searching; faiss would take 1.5 GB


def import_faiss() -> ModuleType:
    """Import faiss; UserError: it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "searching vectors needs faiss, which is not installed: pip install 'openchatkit[retrieval]'"
        ) from error
    return faiss


def kind_for(rows: int) -> str:
    """Return the faiss type that is built for this many rows."""
    return FLAT if rows <= MAX_FLAT else LISTS if rows < _MIN_CODES else CODES


def build(
    vectors: np.ndarray, path: Path, *, kind: str | None = None, lists: int | None = None, seed: int = 0
) -> DenseRecord:
    """Build and write the index of vectors [n, d] for their inner product; return how to search it.

    `kind` is a faiss type (default: by size); `lists` defaults to 4 sqrt(n), as faiss advises. The rows for training
    and measuring are drawn with `seed`. The measured recall is that of the ten nearest rows of 200 vectors, each at a
    cosine of 0.7 to a row, since rows themselves are found more easily than questions.
    """
    faiss = import_faiss()
    rows, dimension = vectors.shape
    kind = kind or kind_for(rows)
    random = np.random.default_rng(seed)
    index, lists = _create_empty(faiss, kind, rows, dimension, lists)
    if not index.is_trained:
        count = min(rows, max(_TRAINED_ON * lists, 256 * _TRAINED_ON if kind == CODES else 0))
        index.train(vectors[np.sort(random.choice(rows, count, replace=False))].astype(np.float32))
    with progress.bar(rows, "vectors indexed", unit="row") as bar:
        for first in range(0, rows, _PIECE):
            index.add(vectors[first : first + _PIECE].astype(np.float32))
            bar.update(min(_PIECE, rows - first))
    with open(path, "wb") as file:  # not faiss's own, whose errors do not say that a disk is full
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    if kind == FLAT:
        return DenseRecord(kind)
    # Codes of a quarter byte a number are less exact about the order than bytes.
    record = DenseRecord(kind, lists=lists, probes=1, candidates=40 if kind == CODES else 4)
    return _tune_probes(Dense(index, record, vectors), random)


def _create_empty(faiss: ModuleType, kind: str, rows: int, dimension: int, lists: int | None) -> tuple[Any, int]:
    """Create an index without rows; return it and its number of lists."""
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == FLAT:
        return faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, metric), 0
    lists = min(lists or int(4 * rows**0.5), rows)
    centres = faiss.IndexFlatIP(dimension)
    if kind == LISTS:
        index = faiss.IndexIVFScalarQuantizer(centres, dimension, lists, faiss.ScalarQuantizer.QT_8bit, metric)
    else:
        assert kind == CODES, kind
        # A byte for four numbers, where the dimension can be cut so.
        parts = max(part for part in range(1, dimension // 4 + 1) if dimension % part == 0) if dimension >= 4 else 1
        index = faiss.IndexIVFPQ(centres, dimension, lists, parts, 8 if rows >= 256 else 4, metric)
    index.cp.niter = 8
    index.cp.spherical = True  # or long centres would attract every vector under an inner product
    index.cp.min_points_per_centroid = 1  # no warning on stderr
    index.own_fields = True
    centres.this.disown()
    return index, lists


def _tune_probes(dense: "Dense", random: np.random.Generator) -> DenseRecord:
    """Return the record with the fewest probes that reach the wanted recall, at most all lists."""
    vectors, record = dense.vectors, dense.record
    count = min(_SAMPLE, len(vectors))
    queries = vectors[np.sort(random.choice(len(vectors), count, replace=False))].astype(np.float32)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    noise = random.standard_normal(queries.shape).astype(np.float32)
    noise *= lengths / np.linalg.norm(noise, axis=1, keepdims=True)
    queries = _NEARNESS * queries + (1 - _NEARNESS**2) ** 0.5 * noise
    k = min(10, len(vectors))
    wanted = vector_store.search_exactly(vectors, queries, k)[1]
    probes = 16
    while True:
        probes = min(probes, record.lists)
        dense.record = DenseRecord(record.type, record.lists, probes, record.candidates)
        found = [dense.search(query, k)[1] for query in queries]
        recall = sum(len(np.intersect1d(a, b)) for a, b in zip(found, wanted, strict=True)) / wanted.size
        if recall >= RECALL or probes == record.lists:
            return DenseRecord(record.type, record.lists, probes, record.candidates, round(recall, 4))
        probes *= 2


class Dense:
    """A faiss index and the vectors [n, d] that it was made of, safe to search from several threads."""

    def __init__(self, index: Any, record: DenseRecord, vectors: np.ndarray) -> None:
        self.index = index
        self.record = record
        self.vectors = vectors
        self._on_gpus: Any = None
        self._one_at_a_time = threading.Lock()  # faiss needs it on GPUs

    @classmethod
    def open(cls, path: Path, record: DenseRecord, vectors: np.ndarray) -> "Dense":
        """Open what `build` wrote; UserError: its type, rows or dimension are not those of the record."""
        index = read_index(path, types={record.type})
        faiss = import_faiss()
        expected = {"rows": len(vectors), "numbers a vector": vectors.shape[1], "metric": faiss.METRIC_INNER_PRODUCT}
        found = {"rows": index.ntotal, "numbers a vector": index.d, "metric": index.metric_type}
        if record.lists:
            expected["lists"], found["lists"] = record.lists, index.nlist
        for what, value in expected.items():
            if found[what] != value:
                raise UserError(f"{path} has {what} {found[what]}, the manifest says {value}: build the index again")
        return cls(index, record, vectors)

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and numbers of the k rows (or all, if fewer) nearest to a query float32 [d], the best first.

        Scores are inner products with the stored vectors.
        """
        k = min(k, len(self.vectors))
        if k <= 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        rows = self._find_candidates(query, k, self.record.probes)
        if len(rows) < k:  # the nearest lists hold fewer
            rows = self._find_candidates(query, k, self.record.lists)
        scores = vector_store.inner_products(self.vectors, query, rows)
        order = np.argsort(-scores, kind="stable")[:k]
        return scores[order], rows[order]

    def to_gpus(self, device: str = "cuda") -> bool:
        """Search the lists on all GPUs for `cuda`, on one of them for `cuda:1`; return whether they are used now.

        They are not if faiss has no GPUs, or for a flat index, which a CPU searches as fast; nor, with a warning, if
        the index does not fit or its codes have a size that GPUs do not support.
        """
        faiss = import_faiss()
        if not self.record.lists or faiss.get_num_gpus() == 0:
            return False
        number = device.partition(":")[2]
        try:
            numbers = [int(number)] if number else list(range(faiss.get_num_gpus()))
            resources = [faiss.StandardGpuResources() for _ in numbers]
            for each in resources:
                each.setTempMemory(_SCRATCH)
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            options.useFloat16 = True  # for tables of product-quantised codes, too large otherwise
            self._on_gpus = faiss.index_cpu_to_gpu_multiple_py(resources, self.index, options, numbers)
        except (RuntimeError, MemoryError, ValueError) as error:
            self._fall_back_to_cpu(error)
        return self._on_gpus is not None

    def _fall_back_to_cpu(self, error: Exception) -> None:
        self._on_gpus = None
        logger.warning(f"vectors are searched on the CPU, since faiss cannot on a GPU: {_reason(error)}")

    def _find_candidates(self, query: np.ndarray, k: int, probes: int) -> np.ndarray:
        """Return the nearest rows [any] by faiss; enough to choose k from, if the lists hold that many."""
        wanted, options = k, {}
        if self.record.lists:
            wanted = min(max(_MIN_CANDIDATES, self.record.candidates * k), len(self.vectors))
            # Parameters for each call, not a setting of the index: another thread may be searching.
            options = {"params": import_faiss().SearchParametersIVF(nprobe=probes)}
        rows = None
        if self._on_gpus is not None and max(k, probes) <= _MOST_ON_GPUS:
            rows = self._search_on_gpus(query, min(wanted, _MOST_ON_GPUS), options)
        if rows is None:
            rows = self.index.search(query[None], wanted, **options)[1][0]
        return rows[(rows >= 0) & (rows < len(self.vectors))]  # -1 stands for missing rows

    def _search_on_gpus(self, query: np.ndarray, wanted: int, options: dict[str, Any]) -> np.ndarray | None:
        """Search on the GPUs; None if they fail, and from then on."""
        with self._one_at_a_time:
            if self._on_gpus is None:
                return None
            try:
                return self._on_gpus.search(query[None], wanted, **options)[1][0]
            except (RuntimeError, MemoryError) as error:
                self._fall_back_to_cpu(error)
                return None


def read_index(path: Path, *, types: set[str]) -> Any:
    """Open a faiss index by memory map; UserError: faiss cannot read it, or it or an index in it is of another type.

    The quantiser of an IVF index may also be a flat or HNSW index. Nothing in it may take more memory than the file has
    bytes.
    """
    faiss = import_faiss()
    with faiss_files.byte_limit(faiss, path.stat().st_size):
        try:
            # One flag maps flat codes, the other inverted lists; each leaves the other kind in memory. The table that
            # only speeds up distances, and grows with lists times codes, is skipped.
            flags = faiss.IO_FLAG_MMAP_IFC if _is_flat(path) else faiss.IO_FLAG_MMAP
            index = faiss.read_index(str(path), flags | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        except RuntimeError as error:
            raise UserError(f"faiss cannot read {path}: {_reason(error)}; build or download the index again") from error
    for part, allowed in _walk_parts(faiss, index, types):
        if (name := type(part).__name__) not in allowed:
            raise UserError(f"{path} is a faiss {name}: expected {' or '.join(sorted(types))}")
    return index


def _walk_parts(faiss: ModuleType, index: Any, types: set[str]) -> Iterator[tuple[Any, set[str]]]:
    """Yield an index and the indices in it, each with its allowed types."""
    yield index, types
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap | faiss.IndexIDMap2):
        yield from _walk_parts(faiss, faiss.downcast_index(index.index), types)
    elif isinstance(index, faiss.IndexRefine):
        yield from _walk_parts(faiss, faiss.downcast_index(index.base_index), types)
        yield faiss.downcast_index(index.refine_index), types | {"IndexFlat"}
    elif isinstance(index, faiss.IndexIVF):
        yield faiss.downcast_index(index.quantizer), {"IndexFlat", "IndexFlatIP", "IndexFlatL2", "IndexHNSWFlat"}
        lists = faiss.downcast_InvertedLists(index.invlists)
        faiss_files.disable_prefetch(lists)


def _is_flat(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"IxSQ", b"IxFI", b"IxF2")


def _reason(error: Exception) -> str:
    """Return the message of a faiss error without its place in the source."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split())
