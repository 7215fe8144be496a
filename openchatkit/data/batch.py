"""A batch: consecutive samples, as training takes them."""

import hashlib
from dataclasses import dataclass

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

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        document_starts = None if self.document_starts is None else move(self.document_starts)
        return Batch(self.first, move(self.tokens), move(self.labels), document_starts, move(self.sources))

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
