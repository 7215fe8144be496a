"""An index opened for searching: quickly whatever its size, since files are mapped and not read.

Opening compares each file's size and time stamp and its header with the manifest; `verify` hashes
everything. A file that does not match is named in the error. The encoder is loaded when a question needs it.
"""

import functools
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from openchatkit import progress, storage
from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.manifest import DamagedError, FileRecord
from openchatkit.formats.retrieval_index import EncoderRecord, IndexRecord, ScoreThreshold
from openchatkit.retrieval import vector_store
from openchatkit.retrieval.dense import Dense
from openchatkit.retrieval.passage import Hit, merge_copies
from openchatkit.retrieval.ranking import DEPTH, QueryEncoder, Ranking, fuse, merge_candidates, passes
from openchatkit.retrieval.snapshot import sparse_paths
from openchatkit.retrieval.sparse import Sparse
from openchatkit.retrieval.table import Table
from openchatkit.retrieval.tokenization import is_named_in

Mode = Literal["fused", "dense", "sparse"]
_Threshold = ScoreThreshold | bool  # True: that of the index; False: none
_TITLES = 20  # the best rows whose titles are compared with the question
_ATTEMPTS = 5  # a writer may replace the snapshot while it is being opened


class Index:
    """See `open`. Searching changes nothing, so several threads may do it at once."""

    def __init__(self, folder: Path, record: IndexRecord, encoder: QueryEncoder | None, device: str = "auto") -> None:
        self.folder, self.record, self.device = folder, record, device
        self.bytes = 0  # of all files

        def path(role: str) -> Path:
            return folder / layout.file_name(role, record.snapshot)

        self.table = Table(path("table"), record.rows)
        try:
            self.vectors: np.ndarray | None = None
            self.dense: Dense | None = None
            if record.encoder is not None and record.dense is not None:
                self.vectors = vector_store.open_array(
                    path("vectors"), rows=record.rows, dimension=record.encoder.dimension
                )
                self.dense = Dense.open(path("dense"), record.dense, self.vectors)
            self.sparse = Sparse(sparse_paths(folder, record.snapshot), record.sparse, record.rows)
        except BaseException:
            self.table.close()
            raise
        self._given = encoder

    @classmethod
    def open(cls, folder: Path | str, encoder: QueryEncoder | None = None, *, device: str = "auto") -> "Index":
        """Open the index of a folder.

        `encoder` defaults to the one that the index was made with, found by its name and loaded to `device` (auto, cpu,
        cuda, cuda:1, mps) when needed. UserError: there is no index; a file is missing, cut, changed since or of
        another kind; `encoder` is not the one that the index was made with.
        """
        folder = Path(folder)
        for attempt in range(_ATTEMPTS):
            record, files = layout.read(folder)
            try:
                layout.check_files(folder, record, files)
                index = cls(folder, record, encoder, device)
                index.bytes = sum(file.size for file in files.values())
            except (UserError, OSError):
                if attempt + 1 < _ATTEMPTS and layout.read(folder)[0].snapshot != record.snapshot:
                    continue
                raise
            try:
                if encoder is not None:
                    check_encoder(folder, record.encoder, encoder)
            except BaseException:
                index.close()
                raise
            return index
        raise AssertionError("unreachable")

    @functools.cached_property
    def encoder(self) -> QueryEncoder:
        """Encoder of questions; UserError: the index has none, or another encoder has its name."""
        if self.record.encoder is None:
            raise UserError(f"{self.folder} was made without an encoder: it can be searched by words alone")
        if self._given is not None:
            return self._given
        from openchatkit.retrieval.encoder import Encoder

        encoder = Encoder(self.record.encoder.name, self.device, self.record.encoder.max_tokens)
        check_encoder(self.folder, self.record.encoder, encoder)
        return encoder

    def to_gpus(self) -> bool:
        """Search vectors on GPUs from now on, if faiss has them and `device` allows it; return whether it does.

        The lists are copied to their memory, which pays off for many questions. See `Dense.to_gpus`.
        """
        if self.dense is None or self.device.partition(":")[0] not in ("auto", "cuda"):
            return False
        return self.dense.to_gpus(self.device)

    def search(self, query: str, k: int = 5, *, mode: Mode = "fused", score_threshold: _Threshold = True) -> list[Hit]:
        """Return the best k passages for a question, each text once; none if nothing in the index is about it.

        `mode`: by meaning (dense), by words (sparse), or both. `score_threshold` defaults to the one of the index;
        False keeps all passages.
        """
        vector = (
            None if mode == "sparse" or not query.strip() or self._searches_words_alone(mode) else self.encode(query)
        )
        depth = max(k, DEPTH)
        while True:
            ranking = self.rank(query, vector, depth if k > 0 else 0, mode=mode, score_threshold=score_threshold)
            hits = merge_copies(self.fetch(ranking), k)
            if len(hits) >= k or len(ranking.rows) < depth:
                return hits
            depth *= 4  # copies take up the places of other passages

    def encode(self, query: str) -> np.ndarray:
        """Return the vector of a question: float32 [d]."""
        return self._prepare(np.asarray(self.encoder.encode([query], query=True)))[0]

    def rank(
        self, query: str, vector: np.ndarray | None, k: int, *, mode: Mode = "fused", score_threshold: _Threshold = True
    ) -> Ranking:
        """Return the rows of `search` for an encoded question; `vector` is None to search by words alone."""
        if mode not in ("fused", "dense", "sparse"):
            raise UserError(f"there is no mode {mode!r}: expected fused, dense or sparse")
        if k <= 0 or not query.strip():
            return Ranking(np.empty(0, np.int64), np.empty(0), None, np.empty(0))
        by_words = mode != "dense" or vector is None
        depth = max(k, DEPTH)
        orders = []
        if vector is not None and mode != "sparse":
            assert self.dense is not None, self.folder
            orders.append(self.dense.search(vector, depth)[1])
        if by_words:
            orders.append(self.sparse.search(query, depth)[1])
        rows = merge_candidates(orders)
        bm25 = self.sparse.scores(query, rows)
        products = cosines = None
        if vector is not None and self.vectors is not None:
            products = vector_store.inner_products(self.vectors, vector, rows)
            cosines = self._to_cosines(products, self.vectors, vector, rows)
        evidence = [products] if products is not None and mode != "sparse" else []
        scores = fuse(evidence + [bm25] * by_words)
        named = self._find_named(query, rows)
        scores += named  # before all others, whose scores reach 1
        best = np.argsort(-scores, kind="stable")
        ranking = Ranking(rows, scores, products, bm25).select(best)
        if score_threshold is not False:
            chosen = passes(
                self.record.score_threshold if score_threshold is True else score_threshold,
                None if cosines is None else cosines[best],
                ranking.sparse / self.sparse.rarest,
                self.sparse.shares(query, ranking.rows) if by_words else np.zeros(len(rows)),
            )
            ranking = ranking.select(chosen | named[best])
        return ranking.select(slice(k))

    def search_vectors(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k rows nearest to each of queries [n, d], without a threshold: scores [n, k], row numbers [n, k].

        If the index has fewer than k rows, k is their number.
        """
        if self.dense is None:
            raise UserError(f"{self.folder} was made without an encoder: it holds no vectors to search")
        found = [self.dense.search(query, min(k, self.record.rows)) for query in self._prepare(queries)]
        return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])

    def fetch(self, ranking: Ranking) -> list[Hit]:
        """Return the passages of a ranking."""
        hits = []
        for at, number in enumerate(ranking.rows.tolist()):
            row = self.table.row(number)
            dense = None if ranking.dense is None else float(ranking.dense[at])
            score, sparse = float(ranking.scores[at]), float(ranking.sparse[at])
            hits.append(Hit(row.text, row.title, row.source, row.place, score, number, dense=dense, sparse=sparse))
        return hits

    def info(self) -> dict[str, Any]:
        """Return the facts of the manifest, and `bytes`, the size of all files."""
        about = self.record.facts()
        del about["time_stamps"]
        return {**about, "bytes": self.bytes}

    def verify(self) -> None:
        """See `verify` of this module."""
        verify(self.folder)

    def close(self) -> None:
        """Close the files."""
        self.table.close()
        self.sparse.close()
        self.vectors = self.dense = None

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _searches_words_alone(self, mode: Mode) -> bool:
        return self.record.encoder is None and mode == "fused"

    def _prepare(self, queries: np.ndarray) -> np.ndarray:
        assert self.record.encoder is not None, self.folder
        return vector_store.prepare(queries, self.record.encoder.dimension, self.record.encoder.metric)

    def _find_named(self, query: str, rows: np.ndarray) -> np.ndarray:
        """Return which rows the question names by their whole title: bool [n], for the best few of an index of words.

        Words alone hardly tell a passage about `json` from one about `json.dumps`, which contains the word too.
        """
        named = np.zeros(len(rows), bool)
        if self.dense is None:
            for at, number in enumerate(rows[:_TITLES].tolist()):
                named[at] = is_named_in(self.table.row(number).title, query)
        return named

    def _to_cosines(
        self, products: np.ndarray, vectors: np.ndarray, vector: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        assert self.record.encoder is not None, self.folder
        if self.record.encoder.metric == vector_store.COSINE:
            return products
        lengths = np.linalg.norm(vectors[rows].astype(np.float32), axis=1) * np.linalg.norm(vector)
        return products / np.maximum(lengths, 1e-9)


def check_encoder(folder: Path, made_with: EncoderRecord | None, encoder: QueryEncoder) -> None:
    """Raise UserError unless an index was made with this encoder: other vectors would mean nothing there."""
    if made_with is None:
        raise UserError(f"{folder} was made without an encoder: open it without one, or build it again with one")
    if encoder.digest != made_with.digest:
        raise UserError(
            f"the encoder {encoder.name} (SHA-256 {encoder.digest[:16]}...) is not the one that {folder} was made "
            f"with, {made_with.name} ({made_with.digest[:16]}...): use that one, or build the index again with this one"
        )


def verify(folder: Path) -> None:
    """Hash every file of an index; DamagedError names the first that has changed.

    If all are intact and only time stamps differ, as after copying, the manifest is given the current ones.
    """
    while True:
        record, files = layout.read(folder)
        try:
            stamps = {name: (folder / name).stat().st_mtime_ns for name in files if (folder / name).is_file()}
            _verify_files(folder, files)
            break
        except (DamagedError, OSError):
            if layout.read(folder)[0].snapshot == record.snapshot:
                raise
            # A writer has replaced this snapshot in the meantime.
    if stamps != record.time_stamps:
        with storage.hold_lock(
            layout.lock_path(folder), f"{folder} is being written to by another process: waiting for it"
        ):
            if layout.read(folder)[0].snapshot == record.snapshot:
                layout.write(folder, record, files.values())


def _verify_files(folder: Path, files: dict[str, FileRecord]) -> None:
    with progress.bar(sum(file.size for file in files.values()), "hashed", unit="B", unit_scale=True) as bar:
        for file in files.values():
            _verify_file(folder / file.name, file)
            bar.update(file.size)


def _verify_file(path: Path, file: FileRecord) -> None:
    if not path.is_file():
        raise DamagedError(f"{path} is missing: build the index again")
    found = storage.sha256(path)
    if found != file.sha256:
        raise DamagedError(
            f"{path} was altered: its SHA-256 is {found[:16]}..., the manifest says {file.sha256[:16]}...; "
            "build the index again, or copy it again from where it is whole"
        )
