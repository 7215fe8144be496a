"""Stores of texts with a label store beside them, as GPT-NeoX has them, compared whole before they are trained on.

That reads both once; it is remembered in the cache for as long as the files keep their stamps.
"""

import hashlib
import json
from pathlib import Path

from openchatkit import progress, storage
from openchatkit.data.stores.cache import LARGE_BYTES, store_identity
from openchatkit.errors import UserError
from openchatkit.formats.label_store import find_difference, open_labelled
from openchatkit.formats.token_store import TokenStore, bin_path, idx_path


def labelled_store(prefix: Path, labels: Path, cache_dir: Path) -> tuple[TokenStore, str]:
    """Return a store with its labels as its mask, and a digest as `store_identity` has it.

    UserError: labels that are out of step with the texts or differ from them, with the first place.
    """
    store = open_labelled(prefix, labels)
    with storage.storage_errors(cache_dir):
        _compare_once(store, TokenStore(labels), cache_dir)
    both = [store_identity(path, cache_dir) for path in (prefix, labels)]
    return store, hashlib.sha256(" ".join(both).encode()).hexdigest()


def _compare_once(store: TokenStore, labels: TokenStore, cache_dir: Path) -> None:
    """Compare labels with texts, unless these very files have been found to be in step."""
    files = [place(each.prefix).resolve() for each in (store, labels) for place in (idx_path, bin_path)]
    names, stamps = [str(path) for path in files], [storage.stamp(path) for path in files]
    known = json.dumps([names, stamps])
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]
    memory = cache_dir / "hashes" / f"labels-{digest}.json"
    waiting = f"{labels.prefix} is compared by another process: waiting for it"
    with storage.hold_lock(storage.lock_path(memory), waiting):
        if memory.is_file() and memory.read_text(encoding="utf-8") == known:
            return
        quick = store.tokens.nbytes + labels.tokens.nbytes <= LARGE_BYTES
        title = f"comparing {labels.prefix.name} with its texts, once"
        with progress.bar(len(store.tokens), title, unit_scale=True, disable=quick or None) as bar:
            difference = find_difference(store, labels, bar.update)
        if difference is not None:
            raise UserError(
                f"{labels.prefix} is out of step with {store.prefix}: {difference} (counted from 0): make both again, "
                "together"
            )
        if all(map(storage.is_settled, stamps)):
            storage.write_text(memory, known)
