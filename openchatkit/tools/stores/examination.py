"""Token stores looked at as a whole: what they hold, and the first place that is damaged."""

from dataclasses import dataclass

import numpy as np

from openchatkit import progress
from openchatkit.formats.token_store import EXCLUDED, NOT_TRAINED, TRAINED, TokenStore, bin_path, mask_path

_PIECE = 1 << 22  # documents or tokens read at a time, so that memory stays flat


@dataclass(frozen=True)
class StoreCounts:
    """`trained` tokens are those that a mask marks, or that are labels; None where a store has neither."""

    documents: int
    tokens: int
    trained: int | None
    dtype: str


def count(store: TokenStore) -> StoreCounts:
    """Count the contents of a store; a mask, or labels, are read for it."""
    tokens, mask = store.tokens, store.mask
    trained: int | None = None
    if mask is not None:
        trained = sum(int(np.count_nonzero(mask[low:high] == TRAINED)) for low, high in _pieces(len(mask)))
    elif tokens.dtype.kind == "i":
        context = sum(int(np.count_nonzero(tokens[low:high] == NOT_TRAINED)) for low, high in _pieces(len(tokens)))
        trained = len(tokens) - context if context else None
    return StoreCounts(store.documents, len(tokens), trained, tokens.dtype.name)


def find_damage(store: TokenStore, *, vocab_size: int | None = None) -> str | None:
    """Return the first place where a store is damaged, in one line, or None.

    Its documents must follow one another in the file, as all that write stores have them; ids are below `vocab_size`,
    and in a store of labels may be NOT_TRAINED; a mask holds the bytes that it can.
    """
    return store.find_index_damage() or _find_token_damage(store, vocab_size) or _find_mask_damage(store)


def _find_token_damage(store: TokenStore, vocab_size: int | None) -> str | None:
    limit = np.iinfo(store.tokens.dtype).max if vocab_size is None else vocab_size - 1
    with progress.bar(len(store.tokens), f"reading {store.prefix.name}", unit="token", unit_scale=True) as bar:
        for low, high in _pieces(len(store.tokens)):
            tokens = store.tokens[low:high]
            if len(wrong := np.flatnonzero(((tokens < 0) & (tokens != NOT_TRAINED)) | (tokens > limit))):
                place = int(wrong[0])
                document, token = store.locate(low + place)
                reason = "" if vocab_size is None or tokens[place] < 0 else f", and the vocabulary has {vocab_size}"
                return f"{bin_path(store.prefix)}: token {token} of document {document} is {tokens[place]}{reason}"
            bar.update(high - low)
    return None


def _find_mask_damage(store: TokenStore) -> str | None:
    if store.mask is None:
        return None
    for low, high in _pieces(len(store.mask)):
        mask = store.mask[low:high]
        if len(wrong := np.flatnonzero(mask > EXCLUDED)):
            document, token = store.locate(low + int(wrong[0]))
            return f"{mask_path(store.prefix)}: token {token} of document {document} is marked {mask[wrong[0]]}"
    return None


def _pieces(size: int) -> list[tuple[int, int]]:
    return [(low, min(low + _PIECE, size)) for low in range(0, size, _PIECE)]
