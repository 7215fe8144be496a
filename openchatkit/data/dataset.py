"""The data set a run trains on: `--task-name` made into samples and batches.

Sample n is a pure function of (seed, n): the mixture says which source it comes from, and the source which tokens. Any
rank can therefore take its own slice of a step, in any order, and a checkpoint needs to store no more than a number.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openchatkit import paths
from openchatkit.data.cache import cached_store
from openchatkit.data.mixture import Interleaving, Part, parse
from openchatkit.data.source import Concatenated, OnePerRow, Source
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats.chat import BOT

IGNORE = -100
PACKINGS = ("concat", "none")
LOSS_ON = ("all", "responses")

# Part of every fingerprint: raise it when the same arguments would give other samples.
_VERSION = 1


class Dataset:
    """Samples without end.

    `sources` tells each one's name, weight, documents, tokens and trained_tokens. `epoch_samples` is the sum, over the
    sources, of the samples in which each of its documents is seen once. `fingerprint` is the same for two data sets
    only if all their samples are.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        packed: Sequence[Concatenated | OnePerRow],
        *,
        seq_length: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.epoch_samples = sum(part.samples for part in packed)
        self.fingerprint = fingerprint
        self._packed = tuple(packed)
        self._interleaving = Interleaving([source.weight for source in sources], seed=seed)

    def source_of(self, n: int) -> int:
        """Which of `sources` sample n comes from."""
        return self._interleaving.locate(n)[0]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels of sample n, int64 [seq_length] each: one row of `batch`."""
        tokens, labels = self.batch(n, 1)
        return tokens[0], labels[0]

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples start to start + count - 1: tokens and labels, int64 [count, seq_length] each.

        labels[i, t] is the token to predict behind tokens[i, t], or IGNORE where none is trained on.
        """
        tokens = np.empty((count, self.seq_length + 1), np.int64)
        mask = np.empty((count, self.seq_length + 1), bool)
        for row in range(count):
            source, sample = self._interleaving.locate(start + row)
            self._packed[source].fill(sample, tokens[row], mask[row])
        labels = np.where(mask[:, 1:], tokens[:, 1:], IGNORE)
        return torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])), torch.from_numpy(labels)


def build_dataset(
    task_names: str,
    *,
    tokenizer_path: Path,
    cache_dir: Path = paths.TOKEN_CACHE,
    seq_length: int,
    packing: str = "concat",
    loss_on: str = "all",
    seed: int,
    flag: str = "--task-name",
) -> Dataset:
    """The data set of `path[:weight],path[:weight]`, tokenised now or found in the cache.

    Every rank may call this at the same time. packing: "concat" cuts all documents, one after another, into windows;
    "none" gives each document a row. loss_on: "all" tokens, or "responses" alone. `flag` is named in errors.
    UserError: see `mixture.parse`, `records`, `cache`; also a source too small, or without a token to train on.
    """
    assert packing in PACKINGS, packing
    assert loss_on in LOSS_ON, loss_on
    parts = parse(task_names, flag=flag)
    tokenizer = Tokenizer(tokenizer_path)
    sources, packed, keys = [], [], []
    for number, part in enumerate(parts):
        source, source_keys = _source(part, number, tokenizer, loss_on=loss_on, cache_dir=cache_dir, seed=seed)
        sources.append(source)
        keys.append([part.weight, *source_keys])
        if packing == "concat":
            packed.append(Concatenated(source, seq_length))
        else:
            packed.append(OnePerRow(source, seq_length, padding=tokenizer.padding))
    decides = [_VERSION, seed, seq_length, packing, keys]
    fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return Dataset(sources, packed, seq_length=seq_length, seed=seed, fingerprint=fingerprint)


def _source(
    part: Part, number: int, tokenizer: Tokenizer, *, loss_on: str, cache_dir: Path, seed: int
) -> tuple[Source, list[str]]:
    """One part's documents, and the keys of their stores."""
    masked = loss_on == "responses"
    opened = [cached_store(file, tokenizer=tokenizer, masked=masked, cache_dir=cache_dir) for file in part.files]
    trained = sum(record.trained_tokens if masked else record.tokens for _, record in opened)
    source = Source(
        part.name, part.weight, [store for store, _ in opened], trained_tokens=trained, number=number, seed=seed
    )
    if not trained:
        raise UserError(
            f"{part.name}: nothing would be trained on with --loss-on responses, since in none of its "
            f"{source.documents} documents a line starts with `{BOT}` and a reply: write replies so, or pass "
            "--loss-on all"
        )
    return source, [record.key for _, record in opened]
