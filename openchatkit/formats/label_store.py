"""Label stores of GPT-NeoX: beside a store of texts one of labels, in step with it, which says what is trained on.

A label is the token at its own place in the texts, or NOT_TRAINED, in a signed type, int32 as GPT-NeoX writes it. Read
together, the labels are the mask of the texts (`formats.token_store`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from openchatkit.errors import UserError
from openchatkit.formats.token_store import NOT_TRAINED, LabelMask, TokenStore, bin_path

_PIECE = 1 << 22  # documents or tokens compared at a time, so that memory stays flat


def open_labelled(prefix: Path, labels: Path) -> TokenStore:
    """Open a store with its labels as its mask. UserError: stores of other sizes, or labels of a type without -100.

    `find_difference` compares all of them.
    """
    store, beside = TokenStore(prefix), TokenStore(labels)
    if beside.tokens.dtype.kind != "i":
        raise UserError(
            f"{bin_path(beside.prefix)} is {beside.tokens.dtype.name}, which cannot hold {NOT_TRAINED}: expected a "
            "store of labels, as tools/preprocess_data.py --mask-before-token writes it"
        )
    for what, found, expected in (
        ("documents", beside.documents, store.documents),
        ("tokens", len(beside.tokens), len(store.tokens)),
    ):
        if found != expected:
            raise UserError(
                f"{beside.prefix} is out of step with {store.prefix}: it holds {found} {what} and the texts {expected}"
            )
    store.mask = LabelMask(beside.tokens)
    return store


def find_difference(store: TokenStore, labels: TokenStore, advance: Callable[[int], object]) -> str | None:
    """Return how labels are out of step with a store of as many documents and tokens, or None.

    `advance` is called with the number of tokens after each piece that was compared.
    """
    for first in range(0, store.documents, _PIECE):
        numbers = np.arange(first, min(first + _PIECE, store.documents))
        texts, beside = store.sizes[numbers], labels.sizes[numbers]
        if len(wrong := np.flatnonzero(texts != beside)):
            place = wrong[0]
            return f"document {first + place} has {texts[place]} tokens and {beside[place]} labels"
        if len(wrong := np.flatnonzero(store.starts(numbers) != labels.starts(numbers))):
            return f"document {first + wrong[0]} begins elsewhere in the labels"
    for first in range(0, len(store.tokens), _PIECE):
        tokens, given = store.tokens[first : first + _PIECE], labels.tokens[first : first + _PIECE]
        if len(wrong := np.flatnonzero((tokens != given) & (given != NOT_TRAINED))):
            place = wrong[0]
            document, token = store.locate(first + int(place))
            return f"token {token} of document {document} is {tokens[place]}, its label {given[place]}"
        advance(len(tokens))
    return None
