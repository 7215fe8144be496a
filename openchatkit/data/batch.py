"""A batch: consecutive samples, as training takes them."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Samples `first`, `first` + 1, ...: one a row, all of one length.

    tokens and labels are int64 [rows, length]: labels[i, t] is the token that follows tokens[i, t], or IGNORE where it
    is not trained on. `document_starts`, int64 [rows, length] or None, confines attention: the place in the row at
    which the document of token t begins, from which on it may look back and its position counts; None lets every token
    see all before it. `sources`, int64 [rows], says which of the data set's sources each row comes from.
    """

    first: int
    tokens: Tensor
    labels: Tensor
    document_starts: Tensor | None
    sources: Tensor

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def pin(self) -> "Batch":
        """Return the same batch in page-locked memory, from which a GPU takes it without a wait."""
        starts = None if self.document_starts is None else self.document_starts.pin_memory()
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory(), document_starts=starts)

    def merge_padding(self) -> "Batch":
        """Return the same batch, with padding at a row's end as one document. It has another digest.

        Padding is documents of one token, on which nothing is trained and which nothing sees. As one document it costs
        attention less, whose work has a share for each document, and gives the same losses and gradients.
        """
        if self.document_starts is None:
            return self
        starts, length = self.document_starts.numpy(), self.tokens.shape[1]
        alone = (starts == np.arange(length)) & (self.labels.numpy() == IGNORE)
        padding = np.logical_and.accumulate(alone[:, ::-1], axis=1)[:, ::-1]
        merged = np.where(padding, length - padding.sum(1, keepdims=True), starts)
        return replace(self, document_starts=torch.from_numpy(merged))

    def digest(self) -> int:
        """Return the sum over the rows, modulo 2^64, of 64 bits of BLAKE2b of a sample's number and all its content.

        A sum does not depend on how samples were dealt to batches and batches to replicas. CPU tensors only.
        """
        content = (
            [self.tokens, self.labels]
            if self.document_starts is None
            else [self.tokens, self.labels, self.document_starts]
        )
        columns = np.concatenate([tensor.numpy().astype("<i4") for tensor in content], axis=1)
        total = 0
        for row, values in enumerate(columns):
            key = (self.first + row).to_bytes(8, "little")
            total += int.from_bytes(hashlib.blake2b(values.tobytes(), digest_size=8, key=key).digest(), "little")
        return total % (1 << 64)
