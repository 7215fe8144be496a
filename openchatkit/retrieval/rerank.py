"""A cross-encoder that reads question and passage together, and reorders the passages that an index found.

It is more exact than vectors, but costs a forward pass for each passage, so it is given only the best few.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from openchatkit.errors import UserError
from openchatkit.formats import sentence_encoder
from openchatkit.retrieval.chunks import text_to_embed
from openchatkit.retrieval.encoder import describe_load_error, device_name, import_sentence_transformers
from openchatkit.retrieval.passage import Passage, Searcher

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

DEPTH = 30  # passages that are scored for one question
_Passage = TypeVar("_Passage", bound=Passage)


class Reranker:
    """A cross-encoder from a folder or the hub, loaded at first use."""

    def __init__(self, name: str | Path, device: str = "auto") -> None:
        self.name = str(name)
        self._device = device

    def rerank(self, query: str, hits: Sequence[_Passage], k: int) -> list[_Passage]:
        """Return the best `k` of these passages with their scores by the cross-encoder; ties keep their order.

        UserError: it cannot be loaded, gives more than one score a passage, or one that is not finite.
        """
        if not hits:
            return []
        pairs = [(query, text_to_embed(hit.title, hit.text)) for hit in hits]
        scores = np.asarray(self._model.predict(pairs, show_progress_bar=False), np.float32)
        if scores.ndim != 1:
            raise UserError(f"{self.name} gives {scores.shape[-1]} scores a passage: expected a cross-encoder with one")
        if not np.isfinite(scores).all():
            raise UserError(f"{self.name} gives scores that are not finite: its weights are damaged, fetch it again")
        order = np.argsort(-scores, kind="stable")[:k]
        return [dataclasses.replace(hits[number], score=float(scores[number])) for number in order]

    @functools.cached_property
    def _model(self) -> "CrossEncoder":
        library = import_sentence_transformers()
        folder = sentence_encoder.fetch(self.name)
        try:
            return library.CrossEncoder(str(folder), device=device_name(self._device), local_files_only=True)
        except Exception as error:  # any error of three libraries for a broken file
            raise describe_load_error(folder, error) from error


class Reranked:
    """A `Searcher` that reorders the passages of another one by a cross-encoder."""

    def __init__(self, searcher: Searcher, reranker: Reranker) -> None:
        self._searcher = searcher
        self._reranker = reranker

    def search(self, query: str, k: int) -> list[Passage]:
        """Return the best k passages by the cross-encoder among the best 30, or the best k if that is more."""
        return self._reranker.rerank(query, self._searcher.search(query, max(k, DEPTH)), k)
