"""Rows of tokens and labels from documents: out of a stream of them laid end to end, or whole ones with padding."""

import numpy as np

from openchatkit.data.batch import IGNORE
from openchatkit.data.samples.order import RunningSums
from openchatkit.data.samples.source import MixtureSource


class DocumentStream:
    """Documents of a source in some order, laid end to end; `name` and `epoch` are those of the sums of their sizes."""

    def __init__(self, source: MixtureSource, documents: np.ndarray, name: str, epoch: int | None) -> None:
        self._source = source
        self._documents = documents
        self._sums = RunningSums(
            source.arrays, name, epoch, len(documents), lambda low, high: source.sizes(documents[low:high])
        )

    def copy(self, position: int, tokens: np.ndarray, mask: np.ndarray) -> int:
        """Copy tokens and mask from `position` on, as many as there is room for and there are; return how many."""
        first, sizes, offset = self._sums.span(position, len(tokens))
        begins = np.zeros_like(sizes)
        begins[0] = offset
        sizes = sizes - begins
        size = min(int(sizes.sum()), len(tokens))
        sizes[-1] -= sizes.sum() - size
        documents = self._documents[first : first + len(sizes)]
        self._source.copy(documents, begins, sizes, tokens[:size], mask[:size])
        return size


def write_window(window: np.ndarray, mask: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> None:
    """Write a window of one token more than a row as its tokens and labels; `mask` says which tokens are trained on."""
    tokens[:] = window[:-1]
    labels[:] = np.where(mask[1:], window[1:], IGNORE)


def write_documents(
    source: MixtureSource,
    documents: np.ndarray,
    sizes: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    padding: int,
) -> None:
    """Write the first `sizes[i]` tokens of documents one after another, cut where a row and its last label are full.

    What is left of the row holds `padding`, which is not trained on.
    """
    window, mask = np.full(len(tokens) + 1, padding), np.zeros(len(tokens) + 1, bool)
    sizes = np.diff(np.minimum(np.cumsum(sizes), len(window)), prepend=0)
    size = int(sizes.sum())
    source.copy(documents, np.zeros_like(sizes), sizes, window[:size], mask[:size])
    write_window(window, mask, tokens, labels)
