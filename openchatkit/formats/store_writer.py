"""Writing token stores (`formats.token_store`), document by document, from the start or from where it stopped."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from openchatkit import storage
from openchatkit.formats.token_store import (
    EXCLUDED,
    HEADER_SIZE,
    TRAINED,
    bin_path,
    choose_dtype,
    idx_path,
    maker_path,
    mask_path,
    pack_header,
)

_PIECE = 1 << 20  # documents indexed at a time when a store is closed, so that memory stays flat


@dataclass(frozen=True)
class StoreProgress:
    """How far a store's files are known to be on disk; more may have been appended since.

    `row`, `row_end`: the position in the source after the last row taken in; `position`: bytes of it that were read;
    `quarantine_size`: bytes of `quarantine.jsonl`.
    """

    rows: int = 0
    row: int = 0
    row_end: int = 0
    position: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    excluded_tokens: int = 0
    untrained: int = 0
    spelled: int = 0
    quarantined: int = 0
    quarantine_size: int = 0


def rename_store(old: Path, new: Path) -> None:
    """Give a whole store another name, its index last, so that no store opens whose other files are missing.

    The store that had the name is gone then, and which tokenizer made that. Both are on one disk.
    """
    for place in (idx_path, bin_path, mask_path, maker_path):
        place(new).unlink(missing_ok=True)
    for place in (bin_path, mask_path, idx_path):
        if place(old).exists():
            os.replace(place(old), place(new))


class TokenStoreWriter:
    """Writes a store document by document; memory does not grow with their number.

    The index has no valid header before `close`, so an unfinished store cannot be opened. `resume` continues files that
    hold at least that much and drops the rest. ValueError: they hold less. Tokens are of the type for `vocab_size`, or
    of `dtype`; one of them is given.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        masked: bool,
        vocab_size: int | None = None,
        dtype: np.dtype | None = None,
        resume: StoreProgress | None = None,
    ) -> None:
        assert (vocab_size is None) != (dtype is None), (vocab_size, dtype)
        start = resume or StoreProgress()
        self.documents = start.documents
        self.tokens = start.tokens
        self.trained_tokens = start.trained_tokens
        self.excluded_tokens = start.excluded_tokens
        self.untrained = start.untrained
        self._prefix = prefix
        self._dtype = dtype or choose_dtype(vocab_size or 0)
        limits = np.iinfo(self._dtype)
        self._lowest, self._highest = (limits.min, limits.max) if vocab_size is None else (0, vocab_size - 1)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files: list[BinaryIO] = []
        try:
            self._bin = self._open(bin_path(prefix), self.tokens * self._dtype.itemsize)
            self._idx = self._open(idx_path(prefix), HEADER_SIZE + 4 * self.documents if resume else 0)
            # A mask that is all zeros may have been removed already.
            self._mask = self._open(mask_path(prefix), self.tokens, grow=not self._marked) if masked else None
        except BaseException:
            self._release()
            raise
        self._idx.seek(0)
        self._idx.write(bytes(HEADER_SIZE))
        self._idx.seek(0, 2)

    @property
    def _marked(self) -> int:
        """Number of bytes of the mask that are not zero."""
        return self.trained_tokens + self.excluded_tokens

    def _open(self, path: Path, size: int, *, grow: bool = False) -> BinaryIO:
        """Open a file, keep `size` bytes of it, and seek to their end."""
        file = open(path, "r+b" if size and path.exists() else "w+b")  # noqa: SIM115 (closed by `close`)
        self._files.append(file)
        if file.seek(0, 2) < size and not grow:
            raise ValueError(f"{path} holds less than {size} bytes")
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, tokens: np.ndarray, sizes: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append documents: their tokens one after another, each one's size, and the mask's byte of every token."""
        assert int(sizes.sum()) == len(tokens), (int(sizes.sum()), len(tokens))
        if len(tokens):
            assert tokens.min() >= self._lowest, "token id out of range"
            assert tokens.max() <= self._highest, "token id out of range"
        self._bin.write(tokens.astype(self._dtype).data)
        self._idx.write(sizes.astype("<i4").data)
        if self._mask is not None:
            assert mask is not None
            assert mask.shape == tokens.shape, (mask.shape, tokens.shape)
            self._mask.write(mask.astype("<u1").data)
            trained = mask == TRAINED
            self.trained_tokens += int(np.count_nonzero(trained))
            self.excluded_tokens += int(np.count_nonzero(mask == EXCLUDED))
            before = np.concatenate([[0], np.cumsum(trained)])
            ends = np.cumsum(sizes)
            self.untrained += int(np.count_nonzero(before[ends] == before[ends - sizes]))
        self.documents += len(sizes)
        self.tokens += len(tokens)

    def sync(self) -> None:
        """Force to disk what was added."""
        for file in self._files:
            storage.sync_file(file)

    def close(self) -> None:
        """Write pointers, document borders and, last, the header; a mask of zeros is removed."""
        offset = 0
        for first in range(0, self.documents, _PIECE):
            self._idx.seek(HEADER_SIZE + 4 * first)
            count = min(_PIECE, self.documents - first)
            ends = np.cumsum(np.frombuffer(self._idx.read(4 * count), "<i4"), dtype=np.int64)
            starts = offset + np.concatenate([[0], ends[:-1]])
            offset += int(ends[-1])
            self._idx.seek(HEADER_SIZE + 4 * self.documents + 8 * first)
            self._idx.write((starts * self._dtype.itemsize).astype("<i8").data)
        self._idx.seek(0, 2)
        for first in range(0, self.documents + 1, _PIECE):
            self._idx.write(np.arange(first, min(first + _PIECE, self.documents + 1), dtype="<i8").data)
        self._idx.seek(0)
        self._idx.write(pack_header(self._dtype, self.documents))
        self._release()
        if self._mask is not None and not self._marked:
            mask_path(self._prefix).unlink()

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # of a full disk, say, which the error in flight reports
                self._release()

    def _release(self) -> None:
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)
