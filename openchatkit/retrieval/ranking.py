"""What a passage must show to be found at all, so that small talk finds nothing.

How near a passage must be depends on the encoder: of some, unrelated texts have a cosine of 0.1, of others one of 0.7.
So an index is asked, when it is built, how near its passages are to remarks that no index answers; a passage must be
nearer to a question by a fifth of what is left from there to 1. Words alone tell less; see `above`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from openchatkit.formats.retrieval_index import ScoreThreshold
from openchatkit.retrieval import vector_store

# None of these is among those that `benchmarks/retrieval_quality.py` asks.
_REMARKS = """Hi!|Hello, nice to see you|Good afternoon|How is it going?|How was your day?|Have a good night|Many thanks
That is very kind of you|You're welcome|Yes, that's right|No, I don't think so|Sounds good|Of course|I'm not sure
Let me think|That's wonderful|I'm happy|I am so angry|Do you have friends?|What do you like best?|I was only joking
Can I ask you something?|Please go on|Sorry, my mistake|Talk to you soon|Happy birthday!"""
REMARKS = _REMARKS.replace("\n", "|").split("|")
# Chosen with MiniLM on titles that the benchmark does not ask; docs/benchmarks.md has what they let through of others.
_NEAR, _WEAK = 0.2, 0.05
# Of BM25's scores, as `above` takes them, chosen in the same way.
_STRENGTH, _STRENGTH_ALONE = 0.74, 0.57
_HINTED, _NAMED = 0.3, 0.55  # of what a question is about
_ROWS = 50_000  # that the remarks are compared with, at most

# Where there are no vectors, or nobody has measured.
NO_COSINE = ScoreThreshold(cosine=-1.0, weak_cosine=-1.0, strength=_STRENGTH, strength_alone=_STRENGTH_ALONE)
DEPTH = 100  # rows that meaning and words each name as candidates


class QueryEncoder(Protocol):
    """What an index asks of an encoder."""

    name: str
    digest: str

    def encode(self, texts: list[str], *, query: bool) -> np.ndarray:
        """float32 [n, dimension]; `query` tells questions from passages, for encoders that want to know."""
        ...


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Rows in order, the best first, with their fused, dense and sparse scores: arrays of one length.

    `dense` is None where no vector was compared.
    """

    rows: np.ndarray
    scores: np.ndarray
    dense: np.ndarray | None
    sparse: np.ndarray

    def only(self, chosen: np.ndarray | slice) -> "Ranking":
        """Some of the rows."""
        dense = None if self.dense is None else self.dense[chosen]
        return Ranking(self.rows[chosen], self.scores[chosen], dense, self.sparse[chosen])


def merge_candidates(orders: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of several orders, each once, as they first come."""
    every = np.concatenate(orders)
    return every[np.sort(np.unique(every, return_index=True)[1])]


def fuse(evidence: Sequence[np.ndarray]) -> np.ndarray:
    """Scores [n] of n candidates, from 0 to 1, out of their scores [n] of each kind."""
    return np.mean([_normalize(scores) for scores in evidence], axis=0)


def sample_rows(rows: int) -> np.ndarray:
    """The numbers of the rows, of so many, that `measure_threshold` wants the vectors of; always the same."""
    if rows <= _ROWS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, _ROWS, replace=False))


def measure_threshold(encoder: QueryEncoder, vectors: np.ndarray) -> ScoreThreshold:
    """The floor for an index with such vectors [n, d], made by this encoder."""
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
    """Which of n rows show enough to be found: bool [n].

    A row's strength is its BM25 score over the weight of a word that is in one row only: 1 is about what two rare words
    in common give, whatever the size of the index. A row is found if the cosine of its vector is at least
    `threshold.cosine`, or that is at least `weak_cosine` and the strength at least `strength`; where there are no vectors,
    if its strength is at least `strength_alone`.

    `shares` are those of `Sparse.shares`. A row whose rare words are a third of what a question is about counts as one
    of strength 1 at least; if they are more than half, it is found as if there were no vectors.
    """
    strengths = np.where(shares >= _HINTED, np.maximum(strengths, 1.0), strengths)
    alone = strengths >= threshold.strength_alone
    if cosines is None:
        return alone
    near = (cosines >= threshold.cosine) | ((cosines >= threshold.weak_cosine) & (strengths >= threshold.strength))
    return near | ((shares >= _NAMED) & alone)


def _normalize(scores: np.ndarray) -> np.ndarray:
    """Where each stands between the lowest and the highest: 0 to 1, and 1 where all are the same."""
    scores = scores.astype(np.float64)
    low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
