"""The data set a run trains on: `--task-name` -> samples and batches.

Sample n is a pure function of (seed, n): the mixture says which source it comes from, and the source which tokens. Any
rank can therefore take its own slice of a step, in any order, and a checkpoint needs to store no more than a number.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from openchatkit.data import neox_order
from openchatkit.data.batch import IGNORE, Batch
from openchatkit.data.mixture import Interleaving, TaskEntry, parse
from openchatkit.data.options import DataOptions
from openchatkit.data.samples.packing import Packed, pack
from openchatkit.data.samples.source import Content, MixtureSource
from openchatkit.data.stores.cache import cached_store, store_identity
from openchatkit.data.stores.labels import labelled_store
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats.token_store import TokenStore

# Part of every fingerprint: raise it when the same arguments would give other samples.
_VERSION = 2


class Dataset:
    """Samples without end.

    `sources` have name, weight, rows, quarantined, documents, tokens and trained_tokens; `packed`, in the same order,
    the samples an epoch and their share of padding; `interleaving` says which sample is of which source.
    `epoch_samples` is the sum, over the sources, of the samples that show each of its documents once, or in GPT-NeoX's
    order the number after which it begins again. `fingerprint` is the same for two data sets only if all their samples
    are. Nothing is predicted from the token `unpredicted`.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        packed: Sequence[Packed],
        options: DataOptions,
        *,
        interleaving: Interleaving,
        epoch_samples: int,
        fingerprint: str,
        unpredicted: int | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.packed = tuple(packed)
        self.seq_length = options.seq_length
        self.interleaving = interleaving
        self.epoch_samples = epoch_samples
        self.fingerprint = fingerprint
        self._separate = options.packing == "documents"
        self._unpredicted = unpredicted

    def epochs(self, samples: int) -> list[float]:
        """Return the number of epochs of each source in the first `samples` samples."""
        counts = self.interleaving.counts(samples)
        return [count * part.passes / part.samples for count, part in zip(counts, self.packed, strict=True)]

    def fill(
        self, source: int, sample: int, tokens: np.ndarray, labels: np.ndarray, document_starts: np.ndarray | None
    ) -> None:
        """Write a sample of a source into rows, as `samples.packing` describes them."""
        self.packed[source].fill(sample, tokens, labels, document_starts)
        if self._unpredicted is not None:
            labels[tokens == self._unpredicted] = IGNORE

    def batch(self, first: int, count: int) -> Batch:
        """Return samples first to first + count - 1."""
        tokens = np.empty((count, self.seq_length), np.int64)
        labels = np.empty_like(tokens)
        document_starts = np.empty_like(tokens) if self._separate else None
        sources = np.empty(count, np.int64)
        for row in range(count):
            source, sample = self.interleaving.locate(first + row)
            sources[row] = source
            self.fill(
                source, sample, tokens[row], labels[row], None if document_starts is None else document_starts[row]
            )
        starts = None if document_starts is None else torch.from_numpy(document_starts)
        return Batch(first, torch.from_numpy(tokens), torch.from_numpy(labels), starts, torch.from_numpy(sources))


def build_dataset(
    task_names: str,
    options: DataOptions,
    *,
    flag: str = "--task-name",
) -> Dataset:
    """Return the data set of `name[:weight],name[:weight]`, tokenised now or found in the cache.

    Every rank may call this at the same time. `flag` is named in errors.
    UserError: see `mixture.parse`, `records.reader`, `stores.cache`, `samples.source`, `samples.packing`.
    """
    entries = parse(task_names, cache_dir=options.data_cache, flag=flag)
    tokenizer = Tokenizer(options.tokenizer)
    names = _number_copies([entry.name for entry in entries])
    sources = [
        MixtureSource(
            name,
            entry.weight,
            _open_stores(entry, tokenizer, options),
            loss_on=options.loss_on,
            max_without_reply=options.max_without_reply,
            number=number,
            seed=options.seed,
            cache_dir=options.data_cache,
        )
        for number, (entry, name) in enumerate(zip(entries, names, strict=True))
    ]
    weighted = any(entry.weighted for entry in entries)
    packed: Sequence[Packed]
    if options.data_order == "neox":
        packed, turns, again = neox_order.arrange(sources, options, padding=tokenizer.padding, weighted=weighted)
    else:
        options = dataclasses.replace(options, whole_epochs=options.whole_epochs and len(sources) > 1 and not weighted)
        packed, turns, again = _arrange(sources, options, padding=tokenizer.padding)
    return Dataset(
        sources,
        packed,
        options,
        interleaving=turns,
        epoch_samples=again,
        fingerprint=_fingerprint(sources, packed, tokenizer, options),
        unpredicted=tokenizer.end_of_text if options.mask_end_of_text else None,
    )


def _arrange(
    sources: Sequence[MixtureSource], options: DataOptions, *, padding: int
) -> tuple[Sequence[Packed], Interleaving, int]:
    """Return the samples of each source in the kit's order, their turns, and how many samples an epoch of all has."""
    packed = [pack(source, options.seq_length, packing=options.packing, padding=padding) for source in sources]
    samples = [part.samples for part in packed]
    if options.whole_epochs:
        return packed, Interleaving.by_quota(samples, seed=options.seed), sum(samples)
    weights = [source.weight for source in sources]
    if options.mixture_unit == "tokens":
        # Turns are of samples. A source whose samples hold fewer tokens than full rows gets so many more turns.
        weights = [
            weight * (options.seq_length / part.tokens_per_sample) for weight, part in zip(weights, packed, strict=True)
        ]
    return packed, Interleaving.by_weight(weights, seed=options.seed), sum(samples)


def _open_stores(entry: TaskEntry, tokenizer: Tokenizer, options: DataOptions) -> list[Content]:
    """Return the stores of one entry and what is known of them."""
    contents = []
    for file in entry.files:
        store, record = cached_store(
            file,
            tokenizer=tokenizer,
            separator=options.document_separator,
            bad_rows=options.bad_rows,
            cache_dir=options.data_cache,
        )
        contents.append(
            Content(
                store,
                record.key,
                record.rows,
                quarantined=record.quarantined,
                trained_tokens=record.trained_tokens,
                excluded_tokens=record.excluded_tokens,
                untrained=record.untrained,
            )
        )
    for prefix in entry.stores:
        if entry.labels is None:
            store, identity = TokenStore(prefix), store_identity(prefix, options.data_cache)
        else:
            store, identity = labelled_store(prefix, entry.labels, options.data_cache)
        if entry.documents is not None:
            first, last = entry.documents
            store, identity = store.part(first, last), f"{identity}[{first}:{last}]"
        contents.append(Content(store, identity, store.documents, vocab_size=tokenizer.vocab_size))
    return contents


def _fingerprint(
    sources: Sequence[MixtureSource], packed: Sequence[Packed], tokenizer: Tokenizer, options: DataOptions
) -> str:
    decides = {
        "version": _VERSION,
        "seed": options.seed,
        "seq_length": options.seq_length,
        "packing": options.packing,
        "loss_on": options.loss_on,
        "mixture_unit": options.mixture_unit,
        "document_separator": options.document_separator,
        "padding": tokenizer.padding,
        "sources": [[source.weight, *source.identity] for source in sources],
        **({"whole_epochs": True} if options.whole_epochs else {}),
        **({"mask_end_of_text": True} if options.mask_end_of_text else {}),
        **({"allow_chopped": False} if not options.allow_chopped else {}),
        # More steps change GPT-NeoX's order only if they are more than its samples.
        **({"neox": [[part.samples, part.passes] for part in packed]} if options.data_order == "neox" else {}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _number_copies(names: Sequence[str]) -> list[str]:
    """Return the names, with #2, #3, ... after repeated ones."""
    unique: list[str] = []
    for name in names:
        copies = (name if number == 1 else f"{name}#{number}" for number in range(1, len(names) + 1))
        unique.append(next(copy for copy in copies if copy not in unique))
    return unique
