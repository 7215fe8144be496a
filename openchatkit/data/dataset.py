"""The data set a run trains on: `--task-name` made into samples and batches.

Sample n is a pure function of (seed, n): the mixture says which source it comes from, and the source which tokens. Any
rank can therefore take its own slice of a step, in any order, and a checkpoint needs to store no more than a number.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from openchatkit.data.batch import IGNORE, Batch
from openchatkit.data.cache import cached_store
from openchatkit.data.mixture import Interleaving, Part, parse
from openchatkit.data.options import DataOptions
from openchatkit.data.source import Concatenated, OnePerRow, Source
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats.chat import BOT

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

    def batch(self, first: int, count: int) -> Batch:
        """Samples first to first + count - 1."""
        tokens = np.empty((count, self.seq_length + 1), np.int64)
        mask = np.empty((count, self.seq_length + 1), bool)
        sources = np.empty(count, np.int64)
        for row in range(count):
            source, sample = self._interleaving.locate(first + row)
            sources[row] = source
            self._packed[source].fill(sample, tokens[row], mask[row])
        labels = np.where(mask[:, 1:], tokens[:, 1:], IGNORE)
        inputs = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))
        return Batch(first, inputs, torch.from_numpy(labels), None, torch.from_numpy(sources))


def build_dataset(
    task_names: str,
    options: DataOptions,
    *,
    flag: str = "--task-name",
) -> Dataset:
    """The data set of `path[:weight],path[:weight]`, tokenised now or found in the cache.

    Every rank may call this at the same time. `flag` is named in errors.
    UserError: see `mixture.parse`, `records`, `cache`; also a source too small, or without a token to train on.
    """
    seed, seq_length, packing = options.seed, options.seq_length, options.packing
    parts = parse(task_names, flag=flag)
    tokenizer = Tokenizer(options.tokenizer)
    sources, packed, keys = [], [], []
    for number, part in enumerate(parts):
        source, source_keys = _source(part, number, tokenizer, options)
        sources.append(source)
        keys.append([part.weight, *source_keys])
        if packing == "concat":
            packed.append(Concatenated(source, seq_length))
        else:
            packed.append(OnePerRow(source, seq_length, padding=tokenizer.padding))
    decides = [_VERSION, seed, seq_length, packing, options.loss_on, keys]
    fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    return Dataset(sources, packed, seq_length=seq_length, seed=seed, fingerprint=fingerprint)


def _source(part: Part, number: int, tokenizer: Tokenizer, options: DataOptions) -> tuple[Source, list[str]]:
    """One part's documents, and the keys of their stores."""
    masked = options.loss_on == "responses"
    opened = [
        cached_store(
            file,
            tokenizer=tokenizer,
            separator=options.document_separator,
            bad_rows=options.bad_rows,
            cache_dir=options.cache_dir,
        )
        for file in part.files
    ]
    for store, _ in opened:
        store.mask = store.mask if masked else None
    trained = sum(record.trained_tokens if masked else record.tokens for _, record in opened)
    source = Source(
        part.name, part.weight, [store for store, _ in opened], trained_tokens=trained, number=number, seed=options.seed
    )
    if not trained:
        raise UserError(
            f"{part.name}: nothing would be trained on with --loss-on responses, since in none of its "
            f"{source.documents} documents a line starts with `{BOT}` and a reply: write replies so, or pass "
            "--loss-on all"
        )
    return source, [record.key for _, record in opened]
