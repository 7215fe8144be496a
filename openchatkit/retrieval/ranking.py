"""The order of the passages found, and the score threshold below which a passage is dropped.

Scores of different kinds are compared by where they stand among those of all candidates: the lowest counts 0, the
highest 1, and the mean of both kinds decides (Bruch, Gai and Ingber, An analysis of fusion functions for hybrid
retrieval, ACM TOIS 42, 2023). It finds more than fusing ranks does; see `benchmarks/retrieval_quality.py`.

A place among candidates does not say whether the best is any good: the score threshold does, so that small talk finds
nothing. The cosine to ask for depends on the encoder: for some, unrelated texts have a cosine of 0.1, for others 0.7.
So when an index is built, its passages are compared with remarks that no index answers; a passage must be nearer to a
question by a fifth of the distance from there to 1. For searching by words alone, see `passes`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from openchatkit.formats.retrieval_index import ScoreThreshold
from openchatkit.retrieval import vector_store

# `benchmarks/retrieval_quality.py` asks none of these.
_REMARKS = """Hi!|Hello, nice to see you|Good afternoon|How is it going?|How was your day?|Have a good night|Many thanks
That is very kind of you|You're welcome|Yes, that's right|No, I don't think so|Sounds good|Of course|I'm not sure
Let me think|That's wonderful|I'm happy|I am so angry|Do you have friends?|What do you like best?|I was only joking
Can I ask you something?|Please go on|Sorry, my mistake|Talk to you soon|Happy birthday!"""
REMARKS = _REMARKS.replace("\n", "|").split("|")
# Chosen with MiniLM on titles that the benchmark does not ask; docs/benchmarks.md says which other remarks pass.
_NEAR, _WEAK = 0.2, 0.05
# Of BM25 scores as `passes` takes them, chosen in the same way.
_STRENGTH, _STRENGTH_ALONE = 0.74, 0.57
_HINTED, _NAMED = 0.3, 0.55  # shares of what a question is about
_ROWS = 50_000  # the most rows that the remarks are compared with

# Where there are no vectors, or nothing was measured.
NO_COSINE = ScoreThreshold(cosine=-1.0, weak_cosine=-1.0, strength=_STRENGTH, strength_alone=_STRENGTH_ALONE)
DEPTH = 100  # candidates of each kind of search


class QueryEncoder(Protocol):
    """The part of an encoder that an index needs for questions."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def encode(self, texts: list[str], *, query: bool) -> np.ndarray:
        """Return float32 [n, dimension]; some encoders treat questions (`query`) and passages differently."""
        ...


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Rows, the best first, with their fused, dense and sparse scores: arrays of one length.

    `dense` is None where no vector was compared.
    """

    rows: np.ndarray
    scores: np.ndarray
    dense: np.ndarray | None
    sparse: np.ndarray

    def select(self, chosen: np.ndarray | slice) -> "Ranking":
        """Return the ranking of some of the rows."""
        dense = None if self.dense is None else self.dense[chosen]
        return Ranking(self.rows[chosen], self.scores[chosen], dense, self.sparse[chosen])


def merge_candidates(orders: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of several orders, each once, by first appearance."""
    every = np.concatenate(orders)
    return every[np.sort(np.unique(every, return_index=True)[1])]


def fuse(evidence: Sequence[np.ndarray]) -> np.ndarray:
    """Return scores [n] from 0 to 1 of n candidates, from their scores [n] of each kind."""
    return np.mean([_normalize(scores) for scores in evidence], axis=0)


def sample_rows(rows: int) -> np.ndarray:
    """Return the row numbers, out of `rows`, whose vectors `measure_threshold` needs; always the same."""
    if rows <= _ROWS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, _ROWS, replace=False))


def measure_threshold(encoder: QueryEncoder, vectors: np.ndarray) -> ScoreThreshold:
    """Measure the score threshold for an index with these vectors [n, d], made by this encoder."""
    questions = vector_store.prepare(encoder.encode(REMARKS, query=True), vectors.shape[1], vector_store.COSINE)
    best = np.full(len(REMARKS), -1.0)
    for part in vector_store.split_rows([vectors]):
        part = part.astype(np.float32)
        lengths = np.maximum(np.linalg.norm(part, axis=1), 1e-9)
        best = np.maximum(best, (questions @ part.T / lengths).max(axis=1))
    typical = float(np.median(best))
    near, weak = (round(typical + share * (1 - typical), 4) for share in (_NEAR, _WEAK))
    return ScoreThreshold(cosine=near, weak_cosine=weak, strength=_STRENGTH, strength_alone=_STRENGTH_ALONE)


def passes(
    threshold: ScoreThreshold, cosines: np.ndarray | None, strengths: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """Return which of n rows pass the threshold: bool [n].

    A row's strength is its BM25 score over the weight of a word that is in one row only: two rare words in common give
    about 1, whatever the size of the index. A row passes if the cosine of its vector is at least `cosine`, or if the
    cosine is at least `weak_cosine` and the strength at least `strength`; without vectors, if its strength is at least
    `strength_alone`.

    `shares` are those of `Sparse.shares`. A row whose rare words are a third of what a question is about has a strength
    of at least 1; if they are more than half, it passes as if there were no vectors.
    """
    strengths = np.where(shares >= _HINTED, np.maximum(strengths, 1.0), strengths)
    alone = strengths >= threshold.strength_alone
    if cosines is None:
        return alone
    near = (cosines >= threshold.cosine) | ((cosines >= threshold.weak_cosine) & (strengths >= threshold.strength))
    return near | ((shares >= _NAMED) & alone)


def _normalize(scores: np.ndarray) -> np.ndarray:
    """Scale scores so that the lowest is 0 and the highest 1; all are 1 where they are equal."""
    scores = scores.astype(np.float64)
    low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
