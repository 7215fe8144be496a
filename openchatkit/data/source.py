"""One source of the mixture: its documents in a new order every epoch, cut into samples.

Which tokens sample k holds is a pure function of (seed, source, k): an epoch's order comes from a generator seeded with
exactly these, and no state is carried from one sample to the next. Two epochs' orders are kept, since a window may
begin in one and end in the next; memory does not grow with training.
"""

import functools
from collections.abc import Sequence

import numpy as np
from loguru import logger

from openchatkit.errors import UserError
from openchatkit.formats.token_store import TokenStore


class Source:
    """The documents of one or several stores as one sequence. `number` sets its shuffles apart from other sources'.

    `order(epoch)` is that epoch's order of the document numbers.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        stores: Sequence[TokenStore],
        *,
        trained_tokens: int,
        number: int,
        seed: int,
    ) -> None:
        self.name = name
        self.weight = weight
        self.trained_tokens = trained_tokens
        self.documents = sum(store.documents for store in stores)
        self.tokens = sum(len(store.tokens) for store in stores)
        self._stores = stores
        self._firsts = np.cumsum([0, *(store.documents for store in stores[:-1])])
        self._sizes = stores[0].sizes if len(stores) == 1 else np.concatenate([store.sizes for store in stores])
        self._seed = (seed, number)
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def longer_than(self, size: int) -> int:
        """How many documents have more than `size` tokens."""
        return int((self._sizes > size).sum())

    def trains_within(self, size: int) -> bool:
        """Whether any document has a token to train on among its first `size`, its very first aside."""
        for store in self._stores:
            if store.mask is None:
                return True
            for start, length in zip(store.starts(np.arange(store.documents)), store.sizes, strict=True):
                if store.mask[start + 1 : start + min(size, length)].any():
                    return True
        return False

    def copy(self, documents: np.ndarray, first: int, tokens: np.ndarray, mask: np.ndarray) -> int:
        """Copy documents one after another into `tokens` (int64) and `mask` (bool), as much as fits.

        Of the first document, what lies before its token number `first` is left out. Returns how many tokens were
        copied. A store without a mask trains on all of them.
        """
        stores = np.searchsorted(self._firsts, documents, side="right") - 1
        filled = 0
        for number, document in zip(stores.tolist(), documents.tolist(), strict=True):
            store = self._stores[number]
            local = document - int(self._firsts[number])
            start = int(store.pointers[local]) // store.tokens.itemsize + first
            size = min(int(store.sizes[local]) - first, len(tokens) - filled)
            tokens[filled : filled + size] = store.tokens[start : start + size]
            mask[filled : filled + size] = True if store.mask is None else store.mask[start : start + size]
            filled += size
            first = 0
        return filled

    def ends(self, epoch: int) -> np.ndarray:
        """How many tokens an epoch's documents hold up to the end of each, in its order: int64 [documents]."""
        return np.cumsum(self._sizes[self.order(epoch)], dtype=np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        # RandomState's streams are frozen for ever, by promise, which those of numpy's newer generators are not.
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([*self._seed, epoch])))
        order = np.arange(self.documents, dtype=np.uint32 if self.documents < 1 << 32 else np.int64)
        generator.shuffle(order)
        return order


class Concatenated:
    """Samples cut from all documents one after another, epoch behind epoch, at a stride of `seq_length`.

    A window has `seq_length` + 1 tokens, of which the last is only predicted, so every token after the very first is
    predicted exactly once an epoch, those at the border of two epochs included.
    """

    def __init__(self, source: Source, seq_length: int) -> None:
        if source.tokens <= seq_length:
            raise UserError(
                f"{source.name} holds {source.tokens} tokens, too few for one sequence of {seq_length} and the token "
                "behind it: add data, pass a smaller --seq-length, or pass --packing none"
            )
        self.samples = -(-source.tokens // seq_length)
        self._source = source
        self._seq_length = seq_length
        self._ends = functools.lru_cache(maxsize=2)(source.ends)

    def fill(self, sample: int, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Write sample number `sample` into rows of `seq_length` + 1; where `mask` is set a token is trained on."""
        epoch, position = divmod(sample * self._seq_length, self._source.tokens)
        filled = 0
        while filled < len(tokens):
            order, ends = self._source.order(epoch), self._ends(epoch)
            first = int(np.searchsorted(ends, position, side="right"))
            last = int(np.searchsorted(ends, position + len(tokens) - filled, side="left"))
            before = int(ends[first - 1]) if first else 0
            documents = order[first : last + 1]
            filled += self._source.copy(documents, position - before, tokens[filled:], mask[filled:])
            epoch, position = epoch + 1, 0


class OnePerRow:
    """One document a sample, cut after `seq_length` + 1 tokens or padded; padding is not trained on."""

    def __init__(self, source: Source, seq_length: int, *, padding: int) -> None:
        self.samples = source.documents
        self._source = source
        self._padding = padding
        if cut := source.longer_than(seq_length + 1):
            logger.warning(
                "{}: {} of {} documents are longer than --seq-length {} and lose their ends",
                source.name,
                cut,
                source.documents,
                seq_length,
            )
            if not source.trains_within(seq_length + 1):
                raise UserError(
                    f"{source.name}: all replies lie behind the first {seq_length} tokens of their documents, so "
                    "nothing would be trained on: pass a larger --seq-length, or --packing concat"
                )

    def fill(self, sample: int, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Write sample number `sample` into rows of `seq_length` + 1; where `mask` is set a token is trained on."""
        epoch, number = divmod(sample, self.samples)
        order = self._source.order(epoch)
        filled = self._source.copy(order[number : number + 1], 0, tokens, mask)
        tokens[filled:] = self._padding
        mask[filled:] = False
