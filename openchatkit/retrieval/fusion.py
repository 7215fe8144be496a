"""One order out of what meaning and words say.

Scores of different kinds are weighed against each other by where they stand among those of all candidates: the lowest
counts 0, the highest 1, and the mean of both kinds decides (Bruch, Gai and Ingber, An analysis of fusion functions for
hybrid retrieval, ACM TOIS 42, 2023). It finds more than fusing ranks does; see `benchmarks/retrieval_quality.py`.

A place among candidates says nothing about whether the best is any good: that is `floor`'s to ask.
"""

from collections.abc import Sequence

import numpy as np

DEPTH = 100  # rows that meaning and words each name as candidates


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
