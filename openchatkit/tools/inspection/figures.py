"""The figures of a mixture: the size of each source, and how much of it a run of some steps uses."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset
from openchatkit.data.options import DataOptions
from openchatkit.formats import cached_store
from openchatkit.jsonl import parse_object


@dataclass(frozen=True)
class SourceFigures:
    """One source. Shares are of 1: `sequences` of all samples, `loss` of all tokens trained on, `waste` of its slots.

    `tokens_per_sample` and `trained_per_sample` are means. `epochs` is how often `samples` pass through the source.
    """

    name: str
    weight: float
    rows: int
    quarantined: int
    documents: int
    tokens: int
    trained_tokens: int
    sequences: float
    samples: int
    epochs: float
    tokens_per_sample: float
    trained_per_sample: float
    loss: float
    waste: float


@dataclass(frozen=True)
class MixtureFigures:
    """All sources over `steps` of `batch_size` samples. The share of the loss is estimated from `drawn` samples of each
    source; 0 where it is exact."""

    sources: tuple[SourceFigures, ...]
    seq_length: int
    steps: int
    batch_size: int
    drawn: int

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size

    @property
    def waste(self) -> float:
        """The share of all slots that hold padding."""
        return math.fsum(source.samples * source.waste for source in self.sources) / self.samples

    @property
    def trained(self) -> float:
        """The share of all labels that count in the loss."""
        trained = math.fsum(source.samples * source.trained_per_sample for source in self.sources)
        return trained / (self.samples * self.seq_length)


@dataclass(frozen=True)
class Quarantine:
    """Rows of a source that were set aside: the file that lists them, and its first rows as text."""

    source: str
    path: Path
    rows: int
    first: tuple[str, ...]


def mixture(dataset: Dataset, options: DataOptions, *, steps: int, batch_size: int, draw: int) -> MixtureFigures:
    """Compute the figures.

    The share of the loss is exact where each token is predicted once an epoch, else estimated from `draw` samples a
    source.
    """
    counts = dataset.interleaving.counts(steps * batch_size)
    exact = options.packing == "concat" and options.data_order == "kit" and not options.mask_end_of_text
    if exact:
        # Over an epoch every token of the source is predicted once.
        trained = [dataset.seq_length * source.trained_tokens / source.tokens for source in dataset.sources]
    else:
        trained = [_mean_trained(dataset, options, number, draw) for number in range(len(dataset.sources))]
    total = math.fsum(count * mean for count, mean in zip(counts, trained, strict=True))
    quotas = dataset.interleaving.quotas
    sources = tuple(
        SourceFigures(
            name=source.name,
            weight=source.weight,
            rows=source.rows,
            quarantined=source.quarantined,
            documents=source.documents,
            tokens=source.tokens,
            trained_tokens=source.trained_tokens,
            sequences=quota / sum(quotas),
            samples=count,
            # The last window of an epoch goes on into the next one, so windows are not a whole number an epoch.
            epochs=count * dataset.seq_length / source.tokens if exact else count * packed.passes / packed.samples,
            tokens_per_sample=packed.tokens_per_sample,
            trained_per_sample=mean,
            loss=count * mean / total if total else 0.0,
            waste=packed.waste,
        )
        for source, packed, quota, count, mean in zip(
            dataset.sources, dataset.packed, quotas, counts, trained, strict=True
        )
    )
    return MixtureFigures(sources, dataset.seq_length, steps, batch_size, 0 if exact else draw)


def quarantines(dataset: Dataset, *, first: int) -> Iterator[Quarantine]:
    """Yield the lists of rows set aside, with at most `first` rows of each."""
    for source in dataset.sources:
        for store in source.stores:
            path = cached_store.quarantine_path(store.prefix.parent)
            if path.exists():
                rows, shown = read_quarantine(path, first)
                yield Quarantine(source.name, path, rows, shown)


def read_quarantine(path: Path, first: int = 0) -> tuple[int, tuple[str, ...]]:
    """Return how many rows a list of rows set aside has, and the first ones as `file:line: reason`."""
    rows, shown = 0, []
    with open(path, encoding="utf-8") as file:
        for line in file:
            rows += 1
            if rows <= first and (row := parse_object(line)):
                shown.append(f"{row['file']}:{row['line']}: {row['reason']}")
    return rows, tuple(shown)


def _mean_trained(dataset: Dataset, options: DataOptions, source: int, draw: int) -> float:
    """Return the mean number of trained labels over `draw` samples of one source's first epoch."""
    packed = dataset.packed[source]
    tokens, labels, document_starts = (np.empty(dataset.seq_length, np.int64) for _ in range(3))
    generator = random.Random(f"{options.seed} {source}")
    numbers = range(packed.samples) if packed.samples <= draw else generator.sample(range(packed.samples), draw)
    trained = 0
    for number in numbers:
        dataset.fill(source, number, tokens, labels, document_starts if options.packing == "documents" else None)
        trained += int((labels != IGNORE).sum())
    return trained / len(numbers)
