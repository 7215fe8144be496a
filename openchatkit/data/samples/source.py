"""One source of the mixture: the documents of one or several stores, as one sequence that every epoch reorders.

Owns which tokens of a store are trained on, and the checks of stores. `data.samples.packing` makes samples of
documents.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loguru import logger

from openchatkit.data.samples import order
from openchatkit.data.samples.arrays import IN_MEMORY, Arrays
from openchatkit.errors import UserError
from openchatkit.formats.chat import BOT
from openchatkit.formats.token_store import (
    EXCLUDED,
    NOT_TRAINED,
    TRAINED,
    LabelMask,
    TokenStore,
    mask_path,
)

_LOOKED_AT = 10_000  # of a store made elsewhere: documents searched for replies, tokens looked at for their kind
_CHARACTERS = 256


@dataclass(frozen=True)
class Content:
    """A store and what is known of it.

    `identity` stands for its bytes in names of files and in fingerprints. `trained_tokens`, `excluded_tokens` and
    `untrained` are as in `StoreRecord`, None where they are not known: in a store made elsewhere, whose ids are then
    checked against `vocab_size` as they are read.
    """

    store: TokenStore
    identity: str
    rows: int
    quarantined: int = 0
    trained_tokens: int | None = None
    excluded_tokens: int | None = None
    untrained: int | None = None
    vocab_size: int | None = None

    @property
    def is_labelled(self) -> bool:
        """Whether the mask is a label store, which may train on all of its texts."""
        return isinstance(self.store.mask, LabelMask)


class MixtureSource:
    """The documents of some stores, numbered through. Source `number` of the mixture shuffles by a seed of its own.

    `loss_on` "responses" trains on what the masks mark, "all" on every token but those that they exclude. `rows` are
    the records that were read, of which `quarantined` became no document. UserError: an index that is
    damaged; with "responses" a mask that is missing, or marks nothing, or everything, and more documents
    without a reply than the share `max_without_reply`.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        contents: Sequence[Content],
        *,
        loss_on: str,
        max_without_reply: float = 1.0,
        number: int,
        seed: int,
        cache_dir: Path,
        in_memory: int = IN_MEMORY,
    ) -> None:
        self.name = name
        self.weight = weight
        self.masked = loss_on == "responses"
        self.identity = [content.identity for content in contents]
        self.rows = sum(content.rows for content in contents)
        self.quarantined = sum(content.quarantined for content in contents)
        self.documents = sum(content.store.documents for content in contents)
        self.tokens = sum(len(content.store.tokens) for content in contents)
        self.seed = (seed, number)
        self.stores = [content.store for content in contents]
        self._contents = contents
        self._firsts = np.cumsum([0, *(content.store.documents for content in contents)])
        folder = Path(cache_dir) / "orders" / order.digest([*self.seed, *self.identity])
        self.arrays = Arrays(folder, self.documents, in_memory=in_memory)
        self.order = functools.lru_cache(maxsize=2)(self._order)
        for content in contents:
            if content.vocab_size is not None:
                if damage := content.store.find_index_damage():
                    raise UserError(f"{damage}: make the store again")
                _check_kind(content.store, content.vocab_size)
        if self.masked:
            self._check_mask()
            self._check_replies(max_without_reply)
        elif any(content.is_labelled for content in contents):
            raise UserError(
                f"{name}: labels are followed with --loss-on responses: pass that, or leave out [labels=...]"
            )

    @functools.cached_property
    def trained_tokens(self) -> int:
        """The number of tokens to train on if every token were predicted; masks made elsewhere are read for it once."""
        if self.masked:
            return sum(_count(content, content.trained_tokens, TRAINED) for content in self._contents)
        return self.tokens - sum(_count(content, content.excluded_tokens, EXCLUDED) for content in self._contents)

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """Return the number of tokens of each of these documents: int64."""
        sizes = np.empty(len(documents), np.int64)
        for content, places, numbers in self._by_store(documents):
            sizes[places] = content.store.sizes[numbers]
        return sizes

    def all_sizes(self) -> Iterator[np.ndarray]:
        """Yield the sizes of all documents by number, int64, some at a time."""
        for content in self._contents:
            for low, high in order.chunks(content.store.documents):
                yield content.store.sizes[low:high].astype(np.int64)

    def copy(
        self, documents: np.ndarray, begins: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, mask: np.ndarray
    ) -> None:
        """Copy `sizes[i]` tokens of document `documents[i]`, from its token `begins[i]` on, one piece after another.

        `tokens` (int64) and `mask` (bool, set where a token is trained on) have room for exactly these. UserError: a
        token outside the vocabulary, in a store made elsewhere.
        """
        ends = np.cumsum(sizes)
        for content, places, numbers in self._by_store(documents):
            lengths, store = sizes[places], content.store
            starts = store.starts(numbers) + begins[places]
            stops = np.cumsum(lengths)
            steps = np.arange(stops[-1])
            source = np.repeat(starts - (stops - lengths), lengths) + steps
            if content.vocab_size is not None:
                _check_tokens(store, content.vocab_size, numbers, lengths, source)
            target = places
            if not isinstance(places, slice):  # pieces of several stores alternate
                target = np.repeat((ends - sizes)[places] - (stops - lengths), lengths) + steps
            tokens[target] = store.tokens[source]
            if self.masked:
                mask[target] = False if store.mask is None else store.mask[source] == TRAINED
            else:
                mask[target] = True if content.excluded_tokens == 0 else _not_excluded(store, source)

    def _by_store(self, documents: np.ndarray) -> Iterator[tuple[Content, slice | np.ndarray, np.ndarray]]:
        """Yield each store that has any of these documents, their places in `documents`, their numbers in the store."""
        if len(self._contents) == 1:
            if len(documents):
                yield self._contents[0], slice(None), documents
            return
        places = np.argsort(documents)
        ordered = documents[places]
        bounds = np.searchsorted(ordered, self._firsts)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            those = slice(bounds[number], bounds[number + 1])
            yield self._contents[number], places[those], ordered[those] - self._firsts[number]

    def _order(self, epoch: int) -> np.ndarray:
        return order.shuffle_numbers(self.arrays, "order", epoch, self.documents, seed=[*self.seed, epoch])

    def _check_mask(self) -> None:
        for content in self._contents:
            if content.trained_tokens is None and content.store.mask is None:
                raise UserError(
                    f"{self.name} has no loss mask ({mask_path(content.store.prefix)}), so --loss-on responses cannot "
                    "tell replies from the rest: make the store from records of chats, or pass --loss-on all"
                )
        counted = all(content.trained_tokens is not None for content in self._contents)
        some, others = _find_kinds(self._contents)
        if not some and counted:
            raise UserError(
                f"{self.name}: nothing would be trained on with --loss-on responses, since in none of its "
                f"{self.documents} documents a line starts with `{BOT}` and a reply: write replies so, or pass "
                "--loss-on all"
            )
        if not some and any(content.is_labelled for content in self._contents):
            raise UserError(f"{self.name}: nothing would be trained on, since its labels are all {NOT_TRAINED}")
        if not some:
            raise UserError(
                f"{self.name}: nothing would be trained on with --loss-on responses, since its loss mask is all zeros: "
                "make the store from records of chats, or pass --loss-on all"
            )
        if not others and not any(content.is_labelled for content in self._contents):
            raise UserError(
                f"{self.name}: its loss mask is all ones, so --loss-on responses would train on prompts as on replies: "
                "make the store again from records of chats, or pass --loss-on all if that is meant"
            )

    def _check_replies(self, allowed: float) -> None:
        """Log how many documents have no reply to train on; UserError where that is a larger share than `allowed`."""
        looked_at, without = 0, 0
        for content in self._contents:
            if content.untrained is not None:
                looked_at, without = looked_at + content.store.documents, without + content.untrained
            else:
                found = _sample_trained(content.store)
                looked_at, without = looked_at + len(found), without + int(np.count_nonzero(~found))
        if not without:
            return
        of = f"{looked_at:,} documents"
        of += f" looked at, {self.documents:,} in all," if looked_at != self.documents else ""
        finding = f"{self.name}: {without:,} of {of} have no reply to train on"
        if without > allowed * looked_at:
            raise UserError(
                f"{finding}, replies being messages of the assistant or what follows `{BOT}` at the start of a line: "
                f"mend or leave out these rows, or pass --max-without-reply {_round_up(without / looked_at)}"
            )
        logger.warning(finding)


def _round_up(share: float) -> float:
    return math.ceil(100 * share) / 100


def _count(content: Content, known: int | None, mark: int) -> int:
    """Return how many bytes of a store's mask are `mark`: `known`, or counted."""
    mask = content.store.mask
    if known is not None or mask is None:
        return known or 0
    return sum(int(np.count_nonzero(mask[low:high] == mark)) for low, high in order.chunks(len(mask)))


def _not_excluded(store: TokenStore, places: np.ndarray) -> np.ndarray | bool:
    return True if store.mask is None else store.mask[places] != EXCLUDED


def _sample_trained(store: TokenStore) -> np.ndarray:
    """Return whether each of some documents, evenly spread over a store, has a token that is trained on."""
    if store.mask is None:
        return np.zeros(store.documents, bool)
    documents = np.unique(np.linspace(0, store.documents - 1, min(store.documents, _LOOKED_AT)).astype(np.int64))
    spans = zip(store.starts(documents).tolist(), store.sizes[documents].tolist(), strict=True)
    return np.array([(store.mask[start : start + size] == TRAINED).any() for start, size in spans], bool)


def _find_kinds(contents: Sequence[Content]) -> tuple[bool, bool]:
    """Return whether any token is trained on, and whether any is not; masks are read until both are known."""
    some = others = False
    for content in contents:
        if content.trained_tokens is not None:
            some |= content.trained_tokens > 0
            others |= content.trained_tokens < len(content.store.tokens)
            continue
        mask = content.store.mask
        assert mask is not None, content.store.prefix
        for low, high in order.chunks(len(mask)):
            if some and others:
                break
            piece = mask[low:high]
            some |= bool((piece == TRAINED).any())
            others |= bool((piece != TRAINED).any())
    return some, others


def _check_kind(store: TokenStore, vocab_size: int) -> None:
    """Raise UserError for a store of bytes, as GPT-NeoX's CharLevelTokenizer makes it: its ids fit any vocabulary."""
    first = store.tokens[:_LOOKED_AT]
    if vocab_size > _CHARACTERS and len(first) == _LOOKED_AT and first.max() < _CHARACTERS:
        raise UserError(
            f"{store.prefix}: its first {_LOOKED_AT:,} tokens are all below {_CHARACTERS}, as "
            f"CharLevelTokenizer makes them, and the tokenizer has a vocabulary of {vocab_size}: make the "
            "store again with the model's tokenizer"
        )


def _check_tokens(
    store: TokenStore, vocab_size: int, documents: np.ndarray, sizes: np.ndarray, places: np.ndarray
) -> None:
    """Raise UserError when a document holds an id that the tokenizer does not have."""
    if not len(places):
        return
    tokens = store.tokens[places]
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
        document = int(documents[np.searchsorted(np.cumsum(sizes), wrong, side="right")])
        raise UserError(
            f"{store.prefix}: document {document} (counted from 0) holds the token {tokens[wrong]}, and the tokenizer "
            f"has a vocabulary of {vocab_size}: pass the tokenizer that the store was made with"
        )
