"""Token stores of random documents, and the memory of a process that reads them."""

from pathlib import Path

import numpy as np

from openchatkit.formats.store_writer import TokenStoreWriter

_VOCABULARY = 50_000


def write_store(prefix: Path, documents: int, *, mean: int | None, masked: bool) -> None:
    """Random documents: of `mean` tokens on average, or as chats are. Every other run of 8 tokens is trained on."""
    generator = np.random.RandomState(0)
    with TokenStoreWriter(prefix, vocab_size=_VOCABULARY, masked=masked) as writer:
        for first in range(0, documents, 1 << 18):
            count = min(1 << 18, documents - first)
            sizes = generator.geometric(1 / mean, count) if mean else generator.lognormal(5, 1, count).astype(np.int64)
            total = int(sizes.sum())
            mask = (np.arange(total) >> 3 & 1).astype(np.uint8) if masked else None
            writer.add(generator.randint(0, _VOCABULARY, total), sizes, mask)


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10
