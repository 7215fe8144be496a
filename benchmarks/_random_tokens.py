"""Data for benchmarks of training: rows of random tokens, with the interface of openchatkit.data.dataset.Dataset."""

from types import SimpleNamespace

import torch

from openchatkit.data.batch import Batch


class RandomTokens:
    """Sample n is drawn anew from a generator seeded by the first number of its batch."""

    def __init__(self, seq_length: int, *, vocabulary: int) -> None:
        self.seq_length, self.vocabulary = seq_length, vocabulary
        self.sources = (SimpleNamespace(name="random"),)

    def batch(self, first: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(first)
        tokens = torch.randint(0, self.vocabulary, (count, self.seq_length + 1), generator=generator)
        sources = torch.zeros(count, dtype=torch.int64)
        return Batch(first, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, sources)
