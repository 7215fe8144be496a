"""GPT-NeoX's turns of sources: each sample is of the source that is furthest behind its share.

The rule goes sample by sample, and each choice depends on all before. It corrects itself, though: from counts that are
a little wrong it makes the right choices within a few dozen samples. So stretches of samples are worked out side by
side, each from an estimate of the counts some samples before it, and those whose counts turn out not to be what the
stretch before has left are worked out again. The result is the rule's own, to the last sample.
"""

from collections.abc import Iterator, Sequence

import numpy as np

_STRETCH = 512  # samples that follow each other in a stretch
_STRETCHES = 1 << 13  # worked out at a time
_AHEAD = 64  # samples before a stretch at which its counts are estimated


def blend(weights: Sequence[float], length: int) -> Iterator[np.ndarray]:
    """Yield which source each of the samples 0 to `length` - 1 is of, some at a time.

    Sample n is of the source with the largest share x max(n, 1) - given, in float64, the first of those with the same:
    the share is its positive weight of the sum of all, and `given` counts the samples before n that it gave.
    """
    total = sum(weights)
    shares = np.array([weight / total for weight in weights], np.float64)
    shares /= shares.sum()
    given = np.zeros(len(shares))
    for first in range(0, length, _STRETCH * _STRETCHES):
        turns, given = _blend_piece(shares, first, min(length - first, _STRETCH * _STRETCHES), given)
        yield turns


def _blend_piece(shares: np.ndarray, first: int, count: int, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources of `count` samples from `first` on, and what each source has given after whole stretches."""
    steps = min(_STRETCH, count)
    places = np.arange(first, first + count, steps, dtype=np.float64)
    dtype = np.min_scalar_type(len(shares) - 1)
    before = _estimate(shares, places - _AHEAD)
    _choose(shares, places - _AHEAD, before, np.empty((_AHEAD, len(places)), dtype))
    before[:, 0] = given
    after = np.empty_like(before)
    turns = np.empty((steps, len(places)), dtype)
    wrong = np.arange(len(places))
    while len(wrong):
        # `take` lays each source's counts out in a row, which indexing does not.
        found, counts = np.empty((steps, len(wrong)), dtype), before.take(wrong, axis=1)
        _choose(shares, places[wrong], counts, found)
        turns[:, wrong], after[:, wrong] = found, counts
        wrong = 1 + np.flatnonzero((before[:, 1:] != after[:, :-1]).any(axis=0))
        before[:, wrong] = after[:, wrong - 1]
    return turns.T.ravel()[:count], after[:, -1]


def _estimate(shares: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return about how many samples each source has given before these numbers: whole ones, `places` in all."""
    exact = shares[:, None] * places
    counts: np.ndarray = np.floor(exact)
    # One more for those that miss most of theirs.
    ranks = np.argsort(np.argsort(counts - exact, axis=0), axis=0)
    return counts + (ranks < places - counts.sum(axis=0))


def _choose(shares: np.ndarray, places: np.ndarray, given: np.ndarray, turns: np.ndarray) -> None:
    """Fill `turns` [steps, stretches] from the samples number `places` on; `given` [sources, stretches] goes along."""
    most, behind = np.empty(len(places)), np.empty(len(places))
    further = np.empty(len(places), bool)
    for step, row in enumerate(turns):
        numbers = np.maximum(places + step, 1)
        np.multiply(numbers, shares[0], out=most)
        most -= given[0]
        row[:] = 0
        for source in range(1, len(shares)):
            np.multiply(numbers, shares[source], out=behind)
            behind -= given[source]
            np.greater(behind, most, out=further)
            np.maximum(most, behind, out=most)
            np.putmask(row, further, source)
        for source in range(len(shares)):
            given[source] += row == source
