"""One order out of what meaning and words say, and what a passage must show to be in it.

Scores of different kinds are weighed against each other by where they stand among those of all candidates: the lowest
counts 0, the highest 1, and the mean of both kinds decides (Bruch, Gai and Ingber, An analysis of fusion functions for
hybrid retrieval, ACM TOIS 42, 2023). It finds more than fusing ranks does; see `benchmarks/retrieval_quality.py`.

A place among candidates says nothing about whether the best is any good, so that is asked of the evidence itself: see
`above`.
"""

from collections.abc import Sequence

import numpy as np

from openchatkit.formats.retrieval_index import EncoderRecord, Floor
from openchatkit.retrieval.vectors import COSINE

DEPTH = 100  # rows that meaning and words each name as candidates

# Chosen on titles that `benchmarks/retrieval_quality.py` does not ask: of MiniLM, the best cosine for 99 of 100 titles
# of awscli's examples is above 0.37, for small talk at most 0.31. Words alone tell less: the best strength is over 0.57
# for 96 of 100 titles, and for 9 of 100 remarks of small talk.
FLOOR = Floor(cosine=0.35, weak_cosine=0.2, strength=0.74, strength_alone=0.57)


def default_floor(encoder: EncoderRecord | None) -> Floor:
    """The floor of an index for which none was chosen.

    It holds for encoders made for cosines. Of others the cosine of unrelated texts may be anything, so none is asked.
    """
    if encoder is None or encoder.metric == COSINE:
        return FLOOR
    return Floor(cosine=-1.0, weak_cosine=-1.0, strength=FLOOR.strength, strength_alone=FLOOR.strength_alone)


def candidates(orders: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of several orders, each once, as they first come."""
    every = np.concatenate(orders)
    return every[np.sort(np.unique(every, return_index=True)[1])]


def fuse(evidence: Sequence[np.ndarray]) -> np.ndarray:
    """Scores [n] of n candidates, from 0 to 1, out of their scores [n] of each kind."""
    return np.mean([_places(scores) for scores in evidence], axis=0)


def _places(scores: np.ndarray) -> np.ndarray:
    """Where each stands between the lowest and the highest: 0 to 1, and 1 where all are the same."""
    scores = scores.astype(np.float64)
    low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)


def above(floor: Floor, cosines: np.ndarray | None, strengths: np.ndarray) -> np.ndarray:
    """Which of n rows show enough to be found: bool [n].

    A row's strength is its BM25 score over the weight of a word that is in one row only: 1 is about what two rare words
    in common give, whatever the size of the index. A row is found if the cosine of its vector is at least
    `floor.cosine`, or that is at least `weak_cosine` and the strength at least `strength`; where there are no vectors,
    if its strength is at least `strength_alone`.
    """
    if cosines is None:
        return strengths >= floor.strength_alone
    return (cosines >= floor.cosine) | ((cosines >= floor.weak_cosine) & (strengths >= floor.strength))
