"""A cross-encoder that looks at question and passage together, and orders again what an index has found.

It sees more than vectors do, and costs a pass of a network for each passage, so it is given the best few alone.
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
from openchatkit.retrieval.encoder import device_name, import_sentence_transformers, unloadable
from openchatkit.retrieval.passage import Passage, Searcher

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

DEPTH = 30  # passages that are looked at for one question
_Found = TypeVar("_Found", bound=Passage)


class Reranker:
    """A cross-encoder of a folder or of the hub, loaded when it is first asked."""

    def __init__(self, name: str | Path, device: str = "auto") -> None:
        self.name = str(name)
        self._device = device

    def rerank(self, query: str, hits: Sequence[_Found], k: int) -> list[_Found]:
        """The best `k` of these passages by the cross-encoder, whose scores they have; its ties keep their order.

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
        except Exception as error:  # whatever a broken file leads to in three libraries
            raise unloadable(folder, error) from error


class Reranked:
    """A `Searcher`: what another finds, ordered again by a cross-encoder."""

    def __init__(self, searcher: Searcher, reranker: Reranker) -> None:
        self._searcher = searcher
        self._reranker = reranker

    def search(self, query: str, k: int) -> list[Passage]:
        """The k passages that the cross-encoder puts first among the best 30, or the best k where that is more."""
        return self._reranker.rerank(query, self._searcher.search(query, max(k, DEPTH)), k)
