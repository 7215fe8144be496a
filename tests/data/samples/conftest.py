"""Sources made of plain lists of tokens."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from openchatkit.data.samples.source import Content, MixtureSource
from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.formats.token_store import TokenStore, mask_path

Documents = Sequence[Sequence[int]]


def write_store(prefix: Path, documents: Documents, masks: Documents | None = None, *, vocab_size: int) -> TokenStore:
    """A store of these documents."""
    with TokenStoreWriter(prefix, vocab_size=vocab_size, masked=False) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64), np.array([len(document)]))
    if masks is not None:
        mask_path(prefix).write_bytes(bytes(itertools.chain.from_iterable(masks)))
    return TokenStore(prefix)


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MixtureSource]:
    """A function that makes a source of stores, each a list of documents; `elsewhere` is the tokenizer's vocabulary.

    `masks` are as the stores are, None for one without; `in_memory` 0 keeps all orders in files.
    """
    numbers = itertools.count()

    def make(
        stores: Sequence[Documents],
        masks: Sequence[Documents | None] | None = None,
        *,
        name: str = "chats",
        loss_on: str = "all",
        elsewhere: int | None = None,
        number: int = 0,
        seed: int = 1,
        cache_dir: Path | None = None,
        in_memory: int = 1 << 20,
    ) -> MixtureSource:
        folder = tmp_path_factory.mktemp("stores")
        contents = []
        for store, documents in enumerate(stores):
            mask = masks and masks[store]
            opened = write_store(folder / f"store{store}", documents, mask, vocab_size=1 << 20)
            trained = sum(map(sum, mask)) if mask else 0
            identity = str(store if cache_dir else next(numbers))
            contents.append(
                Content(opened, identity, opened.documents, 0, None if elsewhere else trained, vocab_size=elsewhere)
            )
        return MixtureSource(
            name,
            1.0,
            contents,
            loss_on=loss_on,
            number=number,
            seed=seed,
            cache_dir=cache_dir or folder,
            in_memory=in_memory,
        )

    return make
