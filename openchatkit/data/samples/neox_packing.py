"""Documents -> samples in GPT-NeoX's order, which numpy's RandomState(seed) decides: for any number of passes at once.

The packings are those of `data.samples.packing`, of which they have the interface, and besides

    length      samples until GPT-NeoX begins again: one less than `samples`

so that sample `length`, which is there, is the last; after it come sample 1 and those that follow. `wanted` is the
number of samples that a run takes of the source: more or fewer of them may be another order of all.
"""

import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from loguru import logger

from openchatkit.data.samples.order import chunks, number_type
from openchatkit.data.samples.packing import Packed
from openchatkit.data.samples.rows import DocumentStream, write_documents, write_window
from openchatkit.data.samples.source import MixtureSource
from openchatkit.errors import UserError

_TOKENS = 1 << 20  # whose masks are read at a time


class NeoxPacked(Packed, Protocol):
    """The interface of every packing in GPT-NeoX's order."""

    length: int


def pack_as_neox(
    source: MixtureSource, seq_length: int, *, packing: str, wanted: int | None, padding: int, allow_chopped: bool
) -> NeoxPacked:
    """Return the samples of a source; without `wanted`, which takes "concat", those of one pass through it.

    UserError: a source too small, or without a document that may be taken.
    """
    if packing == "concat":
        return _Windows(source, seq_length, wanted=wanted)
    assert wanted is not None, "settings without a number of samples are refused: see `options.check_order`"
    kind = _FilledRows if packing == "overflow" else _DocumentPerRow
    return kind(source, seq_length, wanted=wanted, padding=padding, allow_chopped=allow_chopped)


class _Windows:
    """`pack_impl: packed`: windows of `seq_length` + 1 tokens at a stride of `seq_length`, in shuffled order.

    They are cut from all documents of all passes, shuffled together and laid end to end.
    """

    waste = 0.0

    def __init__(self, source: MixtureSource, seq_length: int, *, wanted: int | None) -> None:
        passes = 1 if wanted is None or not source.tokens else -(-(wanted * seq_length + 1) // source.tokens)
        self.samples = (passes * source.tokens - 1) // seq_length
        if self.samples < 1:
            raise UserError(
                f"{source.name} holds {source.tokens} tokens, too few for one sequence of {seq_length} and the token "
                "after it: add data, or give a smaller sequence length"
            )
        if source.tokens <= seq_length:
            logger.warning(
                "{}: its {:,} tokens are fewer than one row of {}, which repeats them",
                source.name,
                source.tokens,
                seq_length,
            )
        self.passes = float(passes)
        self.length = self.samples - 1
        self.tokens_per_sample = float(seq_length)
        self._source = source
        self._seq_length = seq_length

    def fill(
        self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None = None
    ) -> None:
        """See the module; documents are not kept apart, so `document_starts` is None."""
        assert document_starts is None
        stream, order = self._orders
        window, mask = np.empty(len(tokens) + 1, np.int64), np.empty(len(tokens) + 1, bool)
        filled = stream.copy(int(order[_wrap(self, sample)]) * self._seq_length, window, mask)
        assert filled == len(window), (sample, filled)
        write_window(window, mask, tokens, labels)

    @functools.cached_property
    def _orders(self) -> tuple[DocumentStream, np.ndarray]:
        """The documents of all passes, and the order of the windows, which one generator has shuffled in this turn."""
        source, passes = self._source, int(self.passes)
        places = passes * source.documents
        dtype = max(number_type(source.documents), number_type(self.samples), key=lambda kind: kind.itemsize)

        def numbers() -> Iterator[np.ndarray]:
            for length in (*[source.documents] * passes, self.samples):
                for low, high in chunks(length):
                    yield np.arange(low, high, dtype=dtype)

        def shuffle(numbers: np.ndarray) -> None:
            generator = _seed(source)
            generator.shuffle(numbers[:places])
            generator.shuffle(numbers[places:])

        name = f"neox-{self._seq_length}-{passes}"
        both = source.arrays.make(name, None, places + self.samples, dtype, numbers(), shuffle)
        return DocumentStream(source, both[:places], f"{name}-anchors", None), both[places:]


class _DocumentPerRow:
    """`pack_impl: unpacked`: a document a row, in the order of the store; the rows are shuffled.

    After a row's document comes the first token of the next one, then padding; what is too long is cut, or without
    `allow_chopped` its document is left out. So are those without a token to train on, where masks say it.
    """

    def __init__(
        self, source: MixtureSource, seq_length: int, *, wanted: int, padding: int, allow_chopped: bool
    ) -> None:
        self.samples, self.length = wanted, wanted - 1
        self._source = source
        self._padding = padding
        usable = _find_usable(source, seq_length, read=seq_length, allow_chopped=allow_chopped)
        self._documents = _list_usable(source, usable)
        self.passes = wanted / len(self._documents)
        pieces = (source.sizes(self._documents[low:high]) for low, high in chunks(len(self._documents)))
        held = sum(int(np.minimum(sizes + 1, seq_length).sum()) for sizes in pieces)
        self.tokens_per_sample = held / len(self._documents)
        self.waste = 1 - self.tokens_per_sample / seq_length

    def fill(
        self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None = None
    ) -> None:
        """See the module; documents are not kept apart, so `document_starts` is None."""
        assert document_starts is None
        row = int(self._order[_wrap(self, sample)])
        documents = self._documents[np.arange(row, row + 2) % len(self._documents)]
        _write_row(self._source, documents, tokens, labels, padding=self._padding)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        dtype = number_type(self.samples)
        numbers = (np.arange(low, high, dtype=dtype) for low, high in chunks(self.samples))
        name = f"neox-rows-{self.samples}"
        return self._source.arrays.make(name, None, self.samples, dtype, numbers, _seed(self._source).shuffle)


class _FilledRows:
    """`pack_impl: pack_until_overflow`: whole documents, shuffled, a row holding as many of the next as fit into it.

    After a row's last document comes the first token of the next row's first, if there is room, then padding. A
    document too long for a row has one alone and is cut, or without `allow_chopped` left out; so are those without a
    token to train on, where masks say it. The rows are shuffled, too.
    """

    def __init__(
        self, source: MixtureSource, seq_length: int, *, wanted: int, padding: int, allow_chopped: bool
    ) -> None:
        self.samples, self.length = wanted, wanted - 1
        self._source = source
        self._seq_length = seq_length
        self._padding = padding
        self._usable = _find_usable(source, seq_length, read=seq_length + 1, allow_chopped=allow_chopped)
        usable = source.documents if self._usable is None else int(np.count_nonzero(self._usable))
        # Which documents are usable is part of the order.
        kind = f"{'' if allow_chopped else '-whole'}{'-masked' if source.masked else ''}"
        self._name = f"neox-filled-{seq_length}-{wanted}{kind}"
        figures = source.arrays.make(f"{self._name}-figures", None, 2, np.dtype(np.int64), self._measure())
        self._placed, held = figures.tolist()
        self.passes = self._placed / usable
        self.tokens_per_sample = held / wanted
        self.waste = 1 - self.tokens_per_sample / seq_length

    def fill(
        self, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None = None
    ) -> None:
        """See the module; documents are not kept apart, so `document_starts` is None."""
        assert document_starts is None
        order, begins, documents = self._orders
        row = int(order[_wrap(self, sample)])
        _write_row(self._source, documents[begins[row] : begins[row + 1] + 1], tokens, labels, padding=self._padding)

    def _measure(self) -> Iterator[np.ndarray]:
        """Yield how many documents the rows hold, with the one after them, and how many tokens are fed in the rows."""
        generator = _seed(self._source)
        generator.shuffle(np.empty(self.samples, np.uint8))  # as the rows will be, before any document is
        rows = placed = held = 0
        for documents, begins in self._walk(generator):
            taken = begins[: self.samples - rows + 1]
            ends = np.concatenate([[0], np.cumsum(self._source.sizes(documents))])
            full = np.minimum(np.diff(ends[np.append(begins, len(documents))]) + 1, self._seq_length)
            held += int(full[: self.samples - rows].sum())
            rows += len(taken)
            if rows > self.samples:
                yield np.array([placed + int(taken[-1]) + 1, held])
                return
            placed += len(documents)

    @functools.cached_property
    def _orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the rows, the place of each one's first document, and the documents in their places."""
        rows, length = self.samples, 2 * self.samples + 1 + self._placed
        dtype = max(number_type(self._source.documents), number_type(length), key=lambda kind: kind.itemsize)

        def split(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return numbers[:rows], numbers[rows : 2 * rows + 1], numbers[2 * rows + 1 :]

        def place(numbers: np.ndarray) -> None:
            order, begins, documents = split(numbers)
            for low, high in chunks(rows):
                order[low:high] = np.arange(low, high)
            generator = _seed(self._source)
            generator.shuffle(order)
            begun = placed = 0
            for some, starts in self._walk(generator):
                begins[begun : begun + len(starts)] = (placed + starts)[: rows + 1 - begun]
                documents[placed : placed + len(some)] = some[: self._placed - placed]
                begun, placed = begun + len(starts), placed + len(some)
                if begun > rows:
                    break

        zeros = (np.zeros(high - low, dtype) for low, high in chunks(length))
        return split(self._source.arrays.make(self._name, None, length, dtype, zeros, place))

    def _walk(self, generator: np.random.RandomState) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield documents in order, whole rows of them, and where among them each of these rows begins; without end.

        Every pass shuffles what the pass before has left.
        """
        source = self._source
        order = np.arange(source.documents, dtype=number_type(source.documents))
        waiting = order[:0]
        while True:
            generator.shuffle(order)
            for low, high in chunks(source.documents):
                piece = order[low:high]
                waiting = np.concatenate([waiting, piece if self._usable is None else piece[self._usable[piece]]])
                begins = _fill_rows(source.sizes(waiting), self._seq_length + 1)
                if len(begins) > 1:  # the last row may have room for documents that follow
                    yield waiting[: begins[-1]], begins[:-1]
                    waiting = waiting[begins[-1] :]


def _fill_rows(sizes: np.ndarray, room: int) -> np.ndarray:
    """Return where each row begins that takes things of these sizes as long as they fit into `room`, at least one.

    As in GPT-NeoX, nothing joins an empty thing that begins a row.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    after = np.searchsorted(ends, ends[:-1] + room, side="right") - 1
    numbers = np.arange(len(sizes))
    after = np.where(sizes == 0, numbers + 1, np.maximum(after, numbers + 1))
    # The row after each row, after the second, after the fourth: so the number of beginnings doubles at each turn.
    following = np.append(after, len(sizes))
    begins = numbers[:1]
    while len(more := (more := following[begins])[more < len(sizes)]):
        begins = np.concatenate([begins, more])
        following = following[following]
    return begins


def _find_usable(source: MixtureSource, seq_length: int, *, read: int, allow_chopped: bool) -> np.ndarray | None:
    """Return whether each document may be taken, uint8 as a truth: None where all are. UserError where none is.

    Those longer than a row and its last label may not be without `allow_chopped`, and where masks say what is trained
    on, those without a token of it among their first `read`.
    """
    if allow_chopped and not source.masked and source.tokens:
        return None
    each = max(1, _TOKENS // read)

    def find() -> Iterator[np.ndarray]:
        for low in range(0, source.documents, each):
            documents = np.arange(low, min(low + each, source.documents))
            sizes = source.sizes(documents)
            usable = np.full(len(sizes), True) if allow_chopped else sizes <= seq_length + 1
            yield usable & _trains(source, documents, np.minimum(sizes, read)) if source.masked else usable

    name = f"neox-usable-{read}-{seq_length}{'' if allow_chopped else '-whole'}{'-masked' if source.masked else ''}"
    found = source.arrays.make(name, None, source.documents, np.dtype(bool), find())
    if not found.any() or not source.tokens:
        raise UserError(
            f"{source.name}: none of its {source.documents} documents can be taken whole into a row of {seq_length} "
            "tokens with something to train on: allow cut ones, or give a larger sequence length"
        )
    return found


def _trains(source: MixtureSource, documents: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return whether any of the first `sizes[i]` tokens of each document is trained on."""
    total = int(sizes.sum())
    tokens, mask = np.empty(total, np.int64), np.empty(total, bool)
    source.copy(documents, np.zeros_like(sizes), sizes, tokens, mask)
    before = np.concatenate([[0], np.cumsum(mask)])
    ends = np.cumsum(sizes)
    trains: np.ndarray = before[ends] > before[ends - sizes]
    return trains


def _list_usable(source: MixtureSource, usable: np.ndarray | None) -> np.ndarray:
    """Return the numbers of the documents that may be taken, in the order of the store."""
    dtype = number_type(source.documents)
    if usable is None:
        return np.arange(source.documents, dtype=dtype)
    return np.flatnonzero(usable).astype(dtype)


def _write_row(
    source: MixtureSource, documents: np.ndarray, tokens: np.ndarray, labels: np.ndarray, *, padding: int
) -> None:
    """Write documents as a row; of the last, which belongs to another one, only the first token."""
    sizes = source.sizes(documents)
    sizes[-1] = min(sizes[-1], 1)
    write_documents(source, documents, sizes, tokens, labels, padding=padding)


def _wrap(packed: NeoxPacked, sample: int) -> int:
    """Return the sample of the order that a number beyond it stands for."""
    return sample if sample < packed.samples else sample % max(packed.length, 1)


def _seed(source: MixtureSource) -> np.random.RandomState:
    """Return the generator of GPT-NeoX's order, which has one seed for all sources."""
    return np.random.RandomState(source.seed[0])
