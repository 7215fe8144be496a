"""Several token stores merged into one: the bytes that building it of all their inputs, in this order, would give."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from loguru import logger

from openchatkit import progress, storage
from openchatkit.errors import UserError
from openchatkit.formats import token_store
from openchatkit.formats.store_writer import TokenStoreWriter, rename_store
from openchatkit.formats.token_store import CONTEXT, TokenStore, bin_path, idx_path, mask_path

_PIECE = 1 << 22  # tokens copied at a time, or one document


def merge(stores: Sequence[TokenStore], prefix: Path, *, overwrite: bool) -> TokenStore:
    """Write the documents of all stores, and return the new store, which appears under its name when it is whole.

    Masks are merged; of a store without one nothing is trained on. UserError: types of tokens or tokenizers that
    differ, damage, a name that is taken, a full disk.
    """
    if any(store.prefix.resolve() == prefix.resolve() for store in stores):
        raise UserError(f"--output-prefix {prefix} is one of the stores to merge: name another one")
    taken = next((path for place in (idx_path, bin_path, mask_path) if (path := place(prefix)).exists()), None)
    if taken and not overwrite:
        raise UserError(f"{taken} is there already: name another --output-prefix, or pass --overwrite")
    maker = _find_maker(stores)
    for store in stores:
        if store.tokens.dtype != stores[0].tokens.dtype:
            raise UserError(
                f"{store.prefix} is {store.tokens.dtype.name} and {stores[0].prefix} {stores[0].tokens.dtype.name}: "
                "stores of one tokenizer and one command have one type, make these again"
            )
        if damage := store.find_index_damage():
            raise UserError(f"{damage}: make the store again")
    folder = prefix.with_name(f".{prefix.name}.merging")
    with storage.storage_errors(prefix, every=True), storage.own_folder(folder):
        try:
            needed = sum(store.tokens.nbytes + 20 * store.documents for store in stores)
            storage.check_room(folder, needed, f"--output-prefix {prefix}")
            _copy(stores, folder / prefix.name)
            rename_store(folder / prefix.name, prefix)
            if maker:
                token_store.write_maker(prefix, maker)
            storage.sync(prefix.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return TokenStore(prefix)


def _find_maker(stores: Sequence[TokenStore]) -> dict[str, str]:
    """Return the tokenizer that made all stores, as far as it is known; UserError where there are two."""
    made = {store.prefix: token_store.read_maker(store.prefix) for store in stores}
    known = {prefix: maker for prefix, maker in made.items() if maker}
    if not known:
        return {}
    first, maker = next(iter(known.items()))
    if other := next((prefix for prefix, each in known.items() if _identify(each) != _identify(maker)), None):
        raise UserError(
            f"{other} was made by {_describe(known[other])} and {first} by {_describe(maker)}: merge stores of one "
            "tokenizer"
        )
    return maker if len(known) == len(made) else {}


def _identify(maker: dict[str, str]) -> list[str]:
    """Return the type of a tokenizer, and its files by what they hold, or by name where they are gone."""
    files = [Path(maker[name]) for name in ("vocab_file", "merge_file") if name in maker]
    return [
        str(maker.get("tokenizer_type")),
        *(storage.sha256(path) if path.is_file() else str(path) for path in files),
    ]


def _describe(maker: dict[str, str]) -> str:
    return " ".join(maker[name] for name in ("tokenizer_type", "vocab_file") if name in maker)


def _copy(stores: Sequence[TokenStore], prefix: Path) -> None:
    """Write the documents of all stores, some at a time, and force them to disk."""
    masked = any(store.mask is not None for store in stores)
    total = sum(len(store.tokens) for store in stores)
    with (
        TokenStoreWriter(prefix, dtype=stores[0].tokens.dtype, masked=masked) as writer,
        progress.bar(total, "merging", unit="token", unit_scale=True) as bar,
    ):
        for store in stores:
            if masked and store.mask is None:
                logger.warning("{} has no mask: nothing of it is marked as trained on", store.prefix)
            first = begin = 0
            while first < store.documents:
                # The documents that begin within a piece, at least one.
                limit = (begin + _PIECE) * store.tokens.itemsize
                last = max(first + 1, int(np.searchsorted(store.pointers, limit)))
                end = int(store.starts(np.array([last]))[0]) if last < store.documents else len(store.tokens)
                mask = np.full(end - begin, CONTEXT, np.uint8) if store.mask is None else store.mask[begin:end]
                writer.add(store.tokens[begin:end], store.sizes[first:last], mask if masked else None)
                bar.update(end - begin)
                first, begin = last, end
    for path in prefix.parent.iterdir():
        storage.sync(path)
