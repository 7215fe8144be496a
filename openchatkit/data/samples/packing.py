"""How documents become samples: rows of `seq_length` tokens and the labels to predict behind them.

What a sample holds is a pure function of (seed, source, its number). Each packing has

    samples             how many there are in an epoch
    tokens_per_sample   how many places of a row hold a token and no padding, on average
    waste               the share of places that hold padding, 0 to 1
    fill(sample, tokens, labels, starts)

`fill` writes a sample into rows of `seq_length`, int64: labels[t] is the token to predict behind tokens[t], or IGNORE
where it is padding or not trained on, and starts[t], where `starts` is given, the place at which the document of token
t begins.
"""

import functools
from typing import Protocol

import numpy as np
from loguru import logger

from openchatkit.data.batch import IGNORE
from openchatkit.data.samples.best_fit import best_fit_decreasing
from openchatkit.data.samples.order import RunningSums, chunks, number_type, shuffled
from openchatkit.data.samples.source import MixtureSource
from openchatkit.errors import UserError


class Packed(Protocol):
    """What every packing offers."""

    samples: int
    tokens_per_sample: float
    waste: float

    def fill(self, sample: int, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray | None) -> None:
        """Write sample number `sample` of the source."""


def pack(source: MixtureSource, seq_length: int, *, packing: str, padding: int) -> Packed:
    """The samples of a source. UserError: a source too small, or one of which nothing would be trained on."""
    if packing == "concat":
        return Concatenated(source, seq_length)
    return (WholeDocuments if packing == "documents" else OnePerRow)(source, seq_length, padding=padding)


class Concatenated:
    """Samples cut from all documents one after another, epoch behind epoch, at a stride of `seq_length`.

    A window has `seq_length` + 1 tokens, of which the last is only predicted, so every token after the very first is
    predicted exactly once an epoch, those at the border of two epochs included.
    """

    def __init__(self, source: MixtureSource, seq_length: int) -> None:
        if source.tokens <= seq_length:
            raise UserError(
                f"{source.name} holds {source.tokens} tokens, too few for one sequence of {seq_length} and the token "
                "behind it: add data, pass a smaller --seq-length, or pass --packing none"
            )
        self.samples = -(-source.tokens // seq_length)
        self.tokens_per_sample = float(seq_length)
        self.waste = 0.0
        self._source = source
        self._seq_length = seq_length
        self._stream = functools.lru_cache(maxsize=2)(self._sums)

    def fill(self, sample: int, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray | None = None) -> None:
        """See the module; there are no documents of their own here, so `starts` is None."""
        assert starts is None
        epoch, position = divmod(sample * self._seq_length, self._source.tokens)
        window = np.empty(self._seq_length + 1, np.int64)
        mask = np.empty(self._seq_length + 1, bool)
        filled = 0
        while filled < len(window):
            room = len(window) - filled
            first, sizes, offset = self._stream(epoch).span(position, room)
            begins = np.zeros_like(sizes)
            begins[0] = offset
            sizes = sizes - begins
            size = min(int(sizes.sum()), room)
            sizes[-1] -= sizes.sum() - size
            documents = self._source.order(epoch)[first : first + len(sizes)]
            self._source.copy(documents, begins, sizes, window[filled : filled + size], mask[filled : filled + size])
            filled, epoch, position = filled + size, epoch + 1, 0
        tokens[:] = window[:-1]
        labels[:] = np.where(mask[1:], window[1:], IGNORE)

    def _sums(self, epoch: int) -> RunningSums:
        source, order = self._source, self._source.order(epoch)
        return RunningSums(
            source.arrays, "anchors", epoch, source.documents, lambda low, high: source.sizes(order[low:high])
        )


class OnePerRow:
    """One document a sample, cut after `seq_length` + 1 tokens or padded; padding is not trained on."""

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
            self._explain(cut, seq_length)

    def fill(self, sample: int, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray | None = None) -> None:
        """See the module; a row holds a single document, so `starts` is None."""
        assert starts is None
        epoch, number = divmod(sample, self.samples)
        documents = self._source.order(epoch)[number : number + 1]
        sizes = np.minimum(self._source.sizes(documents), len(tokens) + 1)
        size = int(sizes[0])
        row, mask = np.full(len(tokens) + 1, self._padding), np.zeros(len(tokens) + 1, bool)
        self._source.copy(documents, np.zeros(1, np.int64), sizes, row[:size], mask[:size])
        tokens[:] = row[:-1]
        labels[:] = np.where(mask[1:], row[1:], IGNORE)

    def _explain(self, cut: int, seq_length: int) -> None:
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
                f"{source.name}: all replies lie behind the first {seq_length} tokens of their documents, so "
                "nothing would be trained on: pass a larger --seq-length, or --packing concat"
            )


def _trains_within(source: MixtureSource, size: int) -> bool:
    """Whether any document has a token to train on among its first `size`, its very first aside."""
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


class WholeDocuments:
    """Whole documents packed into rows: best fit, the largest first in each row, none seeing another.

    A document of s tokens takes s - 1 places: its last token is only predicted, never fed. One that needs more than a
    row is cut into pieces of `seq_length` places and a rest, each piece's last label being the next one's first token,
    so every token but a document's first is predicted exactly once an epoch. Documents of fewer than two tokens have
    nothing to predict and are left out.

    Which sizes share a row is planned once, on the histogram of sizes; which documents of these sizes, each epoch's
    order decides, and in which order the rows come another one.
    """

    def __init__(self, source: MixtureSource, seq_length: int, *, padding: int) -> None:
        rests = np.zeros(seq_length + 1, np.int64)  # how many documents have a rest of so many places
        self._full = held = left_out = cut = 0
        for sizes in source.all_sizes():
            places = np.maximum(sizes - 1, 0)
            rests += np.bincount(places % seq_length, minlength=seq_length + 1)
            self._full += int((places // seq_length).sum())
            held += int(places.sum())
            left_out += int((places == 0).sum())
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
        self._rows = functools.lru_cache(maxsize=2)(self._row_order)
        self._grouped = functools.lru_cache(maxsize=2)(self._by_rest)
        message = "{}: {} documents in {} rows of {} tokens, {:.2%} of which is padding; {} were cut"
        logger.info(message, source.name, source.documents - left_out, self.samples, seq_length, self.waste, cut)
        if left_out:
            logger.warning("{}: {} documents have fewer than two tokens and are left out", source.name, left_out)

    def fill(self, sample: int, tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray | None) -> None:
        """See the module; a place that holds padding is a document of its own."""
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
        if starts is not None:
            starts[:size] = np.repeat(ends - places, places)
            starts[size:] = np.arange(size, len(starts))

    def _pieces(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the epoch's row `number` holds: documents, the token of each to begin at, how many places of each."""
        row = int(self._rows(epoch)[number])
        if row < self._full:
            document, _, piece = self._whole_rows.span(row, 1)
            return np.array([document]), np.array([piece * self._seq_length]), np.array([self._seq_length])
        places, items = self._plan.row(row - self._full)
        documents = self._grouped(epoch)[self._offsets[places] + items]
        return documents, self._source.sizes(documents) - 1 - places, places

    @functools.cached_property
    def _whole_rows(self) -> RunningSums:
        """Where the rows lie that a document fills by itself, by documents' numbers."""

        def rows(low: int, high: int) -> np.ndarray:
            return np.maximum(self._source.sizes(np.arange(low, high)) - 1, 0) // self._seq_length

        return RunningSums(self._source.arrays, f"whole-{self._seq_length}", None, self._source.documents, rows)

    def _row_order(self, epoch: int) -> np.ndarray:
        seed = [*self._source.seed, epoch, 1]  # one number more than an order of documents
        return shuffled(self._source.arrays, f"rows-{self._seq_length}", epoch, self.samples, seed=seed)

    def _by_rest(self, epoch: int) -> np.ndarray:
        """The documents that have a rest, in groups of one size of it, each group in the epoch's order."""
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
