"""Documents -> samples: rows of `seq_length` tokens and the labels that follow them.

The content of a sample is a pure function of (seed, source, its number). Each packing has

    samples             samples in an epoch, or in `passes` of them
    passes              how often these go through the source
    tokens_per_sample   places of a row that hold a token and not padding, on average
    waste               the share of places that hold padding, 0 to 1
    fill(sample, tokens, labels, document_starts)

`fill` writes a sample into rows of `seq_length`, int64: labels[t] is the token that follows tokens[t], or IGNORE where
it is padding or not trained on, and document_starts[t], if given, the place at which the document of token t begins.
"""

import functools
from typing import Protocol

import numpy as np
from loguru import logger

from openchatkit.data.batch import IGNORE
from openchatkit.data.samples.best_fit import best_fit_decreasing
from openchatkit.data.samples.order import RunningSums, chunks, number_type, shuffle_numbers
from openchatkit.data.samples.rows import DocumentStream, write_documents, write_window
from openchatkit.data.samples.source import MixtureSource
from openchatkit.errors import UserError


class Packed(Protocol):
    """The interface of every packing."""

    samples: int
    passes: float
    tokens_per_sample: float
    waste: float

    def fill(self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None) -> None:
        """Write sample number `sample` of the source."""


def pack(source: MixtureSource, seq_length: int, *, packing: str, padding: int) -> Packed:
    """Return the samples of a source. UserError: a source too small, or without anything to train on."""
    if packing == "concat":
        return _Concatenated(source, seq_length)
    return (_WholeDocuments if packing == "documents" else _OnePerRow)(source, seq_length, padding=padding)


class _Concatenated:
    """Samples cut from all documents one after another, epoch after epoch, at a stride of `seq_length`.

    A window has `seq_length` + 1 tokens, of which the last is only predicted, so every token after the very first is
    predicted exactly once an epoch, those at the border of two epochs included.
    """

    passes = 1.0

    def __init__(self, source: MixtureSource, seq_length: int) -> None:
        if source.tokens <= seq_length:
            raise UserError(
                f"{source.name} holds {source.tokens} tokens, too few for one sequence of {seq_length} and the token "
                "after it: add data, pass a smaller --seq-length, or pass --packing none"
            )
        self.samples = -(-source.tokens // seq_length)
        self.tokens_per_sample = float(seq_length)
        self.waste = 0.0
        self._source = source
        self._seq_length = seq_length
        self._stream = functools.lru_cache(maxsize=2)(self._order_documents)

    def fill(
        self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None = None
    ) -> None:
        """See the module; documents are not kept apart, so `document_starts` is None."""
        assert document_starts is None
        epoch, position = divmod(sample * self._seq_length, self._source.tokens)
        window = np.empty(self._seq_length + 1, np.int64)
        mask = np.empty(self._seq_length + 1, bool)
        filled = 0
        while filled < len(window):
            filled += self._stream(epoch).copy(position, window[filled:], mask[filled:])
            epoch, position = epoch + 1, 0
        write_window(window, mask, tokens, labels)

    def _order_documents(self, epoch: int) -> DocumentStream:
        return DocumentStream(self._source, self._source.order(epoch), "anchors", epoch)


class _OnePerRow:
    """One document a sample, cut after `seq_length` + 1 tokens or padded; padding is not trained on."""

    passes = 1.0

    def __init__(self, source: MixtureSource, seq_length: int, *, padding: int) -> None:
        cut = held = 0
        for sizes in source.all_sizes():
            cut += int((sizes > seq_length + 1).sum())
            held += int(np.minimum(sizes, seq_length).sum())
        if not held:
            raise UserError(f"{source.name}: none of its {source.documents} documents has a token: add data")
        self.samples = source.documents
        self.tokens_per_sample = held / self.samples
        self.waste = 1 - self.tokens_per_sample / seq_length
        self._source = source
        self._padding = padding
        logger.info("{}: {:.1%} of its rows of {} tokens is padding", source.name, self.waste, seq_length)
        if cut:
            self._report_cut(cut, seq_length)

    def fill(
        self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None = None
    ) -> None:
        """See the module; a row holds a single document, so `document_starts` is None."""
        assert document_starts is None
        epoch, number = divmod(sample, self.samples)
        documents = self._source.order(epoch)[number : number + 1]
        sizes = self._source.sizes(documents)
        write_documents(self._source, documents, sizes, tokens, labels, padding=self._padding)

    def _report_cut(self, cut: int, seq_length: int) -> None:
        source = self._source
        logger.warning(
            "{}: {} of {} documents are longer than --seq-length {} and lose their ends",
            source.name,
            cut,
            source.documents,
            seq_length,
        )
        if not _trains_within(source, seq_length + 1):
            raise UserError(
                f"{source.name}: all replies lie after the first {seq_length} tokens of their documents, so "
                "nothing would be trained on: pass a larger --seq-length, or --packing concat"
            )


def _trains_within(source: MixtureSource, size: int) -> bool:
    """Return whether any document has a token to train on among tokens 2 to `size`."""
    if not source.masked:
        return True
    each = max(1, (1 << 20) // size)
    for low in range(0, source.documents, each):
        documents = np.arange(low, min(low + each, source.documents))
        sizes = np.clip(source.sizes(documents), 1, size) - 1
        tokens, mask = np.empty(sizes.sum(), np.int64), np.empty(sizes.sum(), bool)
        source.copy(documents, np.ones_like(documents), sizes, tokens, mask)
        if mask.any():
            return True
    return False


class _WholeDocuments:
    """Whole documents packed into rows by best fit, the largest first in each row, none attending to another.

    A document of s tokens takes s - 1 places: its last token is only predicted, never fed. One that needs more than a
    row is cut into pieces of `seq_length` places and a rest; each piece's last label is the next one's first token,
    so every token but a document's first is predicted exactly once an epoch. Documents of fewer than two tokens have
    nothing to predict and are excluded.

    Which sizes share a row is planned once, on the histogram of sizes. Each epoch has an order that decides which
    documents of these sizes those are, and another for the rows.
    """

    passes = 1.0

    def __init__(self, source: MixtureSource, seq_length: int, *, padding: int) -> None:
        rests = np.zeros(seq_length + 1, np.int64)  # documents by the places of their rest
        self._full = held = excluded = cut = 0
        for sizes in source.all_sizes():
            places = np.maximum(sizes - 1, 0)
            rests += np.bincount(places % seq_length, minlength=seq_length + 1)
            self._full += int((places // seq_length).sum())
            held += int(places.sum())
            excluded += int((places == 0).sum())
            cut += int((places > seq_length).sum())
        if not held:
            raise UserError(f"{source.name}: none of its {source.documents} documents has two tokens: add data")
        rests[0] = 0
        self._plan = best_fit_decreasing(rests)
        self._offsets = np.cumsum(rests) - rests
        self._rests = int(rests.sum())
        self.samples = self._full + self._plan.rows
        self.tokens_per_sample = held / self.samples
        self.waste = 1 - self.tokens_per_sample / seq_length
        self._source = source
        self._seq_length = seq_length
        self._padding = padding
        self._rows = functools.lru_cache(maxsize=2)(self._order_rows)
        self._grouped = functools.lru_cache(maxsize=2)(self._group_by_rest)
        message = "{}: {} documents in {} rows of {} tokens, {:.2%} of which is padding; {} were cut"
        logger.info(message, source.name, source.documents - excluded, self.samples, seq_length, self.waste, cut)
        if excluded:
            logger.warning("{}: {} documents have fewer than two tokens and are left out", source.name, excluded)

    def fill(self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None) -> None:
        """See the module; each place of padding is a document of its own."""
        documents, begins, places = self._pieces(*divmod(sample, self.samples))
        ends = np.cumsum(places)
        size, number = int(ends[-1]), len(documents)
        row, mask = np.empty(size + number, np.int64), np.empty(size + number, bool)
        self._source.copy(documents, begins, places + 1, row, mask)
        fed = np.ones(size + number, bool)
        fed[ends + np.arange(number)] = False
        predicted = fed[:-1]
        tokens[:size] = row[fed]
        labels[:size] = np.where(mask[1:][predicted], row[1:][predicted], IGNORE)
        tokens[size:] = self._padding
        labels[size:] = IGNORE
        if document_starts is not None:
            document_starts[:size] = np.repeat(ends - places, places)
            document_starts[size:] = np.arange(size, len(document_starts))

    def _pieces(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the documents of the epoch's row `number`, the first token of each there, and its places."""
        row = int(self._rows(epoch)[number])
        if row < self._full:
            document, _, piece = self._whole_rows.span(row, 1)
            return np.array([document]), np.array([piece * self._seq_length]), np.array([self._seq_length])
        places, items = self._plan.row(row - self._full)
        documents = self._grouped(epoch)[self._offsets[places] + items]
        return documents, self._source.sizes(documents) - 1 - places, places

    @functools.cached_property
    def _whole_rows(self) -> RunningSums:
        """The rows that a document fills alone, by documents' numbers."""

        def rows(low: int, high: int) -> np.ndarray:
            return np.maximum(self._source.sizes(np.arange(low, high)) - 1, 0) // self._seq_length

        return RunningSums(self._source.arrays, f"whole-{self._seq_length}", None, self._source.documents, rows)

    def _order_rows(self, epoch: int) -> np.ndarray:
        seed = [*self._source.seed, epoch, 1]  # one number more than the seed of an order of documents
        return shuffle_numbers(self._source.arrays, f"rows-{self._seq_length}", epoch, self.samples, seed=seed)

    def _group_by_rest(self, epoch: int) -> np.ndarray:
        """Return the documents that have a rest, grouped by its size, each group in the epoch's order."""
        order, dtype = self._source.order(epoch), number_type(self._source.documents)
        small = np.min_scalar_type(self._seq_length)  # numbers of 16 bits are sorted several times as fast as of 64

        def deal(grouped: np.ndarray) -> None:
            at = self._offsets.copy()
            for low, high in chunks(len(order)):
                documents = order[low:high]
                rests = (np.maximum(self._source.sizes(documents) - 1, 0) % self._seq_length).astype(small)
                documents, rests = documents[rests > 0], rests[rests > 0]
                places = np.argsort(rests, kind="stable")
                counts = np.bincount(rests, minlength=len(at))
                grouped[np.repeat(at - np.cumsum(counts) + counts, counts) + np.arange(len(places))] = documents[places]
                at += counts

        zeros = (np.zeros(high - low, dtype) for low, high in chunks(self._rests))
        return self._source.arrays.make(f"grouped-{self._seq_length}", epoch, self._rests, dtype, zeros, deal)
