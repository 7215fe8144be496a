"""One small token store, and its index packed by hand."""

import struct
from pathlib import Path

import numpy as np

from openchatkit.formats.store_writer import TokenStoreWriter

DOCUMENTS = [[5, 6, 7], [65498], [0, 1, 2, 3]]


def write(prefix: Path, *, vocab_size: int = 65499, masked: bool = False) -> TokenStoreWriter:
    """A store of DOCUMENTS, added in two calls; the mask is 1 on even tokens."""
    with TokenStoreWriter(prefix, vocab_size=vocab_size, masked=masked) as writer:
        for documents in (DOCUMENTS[:2], DOCUMENTS[2:]):
            tokens = np.concatenate(documents)
            writer.add(tokens, np.array([len(d) for d in documents]), (tokens % 2 == 0) if masked else None)
    return writer


def packed(code: int, size: int) -> bytes:
    """The index of DOCUMENTS as gpt-neox writes it, for tokens of `size` bytes."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, 3, 4)
        + struct.pack("<3i", 3, 1, 4)
        + struct.pack("<3q", 0, 3 * size, 4 * size)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
