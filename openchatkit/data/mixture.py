"""The mixture: the sources that `--task-name` names, their weights, and which of them sample number n comes from.

Weights are shares of sequences, as in the original kit. Sources take turns by quota, not by chance: a cycle of slots is
shared out in proportion to the weights and repeats for ever, so sample n's source, and how many samples that source
has given before, are arithmetic. Where whole epochs are asked for and no weights, the cycle is an epoch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openchatkit.data import task_names
from openchatkit.errors import UserError

CYCLE = 1 << 14
STRIDE = 1 << 10  # turns between two counts of those before


@dataclass(frozen=True)
class TaskEntry:
    """One entry of `--task-name`: name, weight, and data, which is either files of records or prefixes of token stores.

    `weighted`: the weight was given. `documents`, `labels`: see `task_names.DataFiles`.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    stores: tuple[Path, ...]
    weighted: bool = False
    documents: tuple[int, int] | None = None
    labels: Path | None = None


def parse(value: str, *, cache_dir: Path, flag: str = "--task-name") -> list[TaskEntry]:
    """Return the entries of `name[:weight],name[:weight]`; for names see `data.task_names`.

    Remote data is fetched into `cache_dir`. UserError, naming `flag`, for a bad weight, for a name without data, and
    when fetching fails.
    """
    try:
        entries = [_parse_entry(entry, cache_dir) for entry in _split_entries(value)]
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    except OSError as error:  # a name too long for a file, or a folder that may not be read
        raise UserError(f"{flag}: {error.filename}: {error.strerror or error}") from error
    if not entries:
        raise UserError(f"{flag} names no data: expected name[:weight],name[:weight]")
    return entries


def _split_entries(value: str) -> list[str]:
    """Split at commas, but not at those in the name of a file."""
    pieces, entries = value.split(","), []
    while pieces:
        lengths = range(len(pieces), 1, -1) if not _is_here(pieces[0].strip()) else ()
        taken = next((length for length in lengths if _is_here(",".join(pieces[:length]).strip())), 1)
        entries.append(",".join(pieces[:taken]).strip())
        del pieces[:taken]
    return [entry for entry in entries if entry]


def _is_here(entry: str) -> bool:
    """Return whether an entry, with or without its weight, is the name of a file on this machine."""
    name, _, weight = entry.rpartition(":")
    return task_names.is_path(entry) or (_number(weight) is not None and task_names.is_path(name))


def _parse_entry(entry: str, cache_dir: Path) -> TaskEntry:
    # A path may itself hold colons, so an entry that is a file's name has no weight.
    if found := task_names.find_local(entry):
        return TaskEntry(entry, 1.0, found.files, found.stores, documents=found.documents, labels=found.labels)
    head, _, text = entry.rpartition(":")
    name, weight = head.strip(), _number(text)
    # The colon may also belong to an address, or to a name without a weight.
    weighted = bool(name) and (
        weight is not None or (not task_names.is_address(entry) and task_names.find_local(name) is not None)
    )
    if not weighted:
        name, text, weight = entry, "", 1.0
    found = task_names.find_local(name)
    if weight is None or not math.isfinite(weight) or weight <= 0:
        raise UserError(f"{name} has the weight {text!r}: expected a number above 0 (or leave the file out)")
    found = found or task_names.fetch_remote(name, cache_dir)
    if found is None:
        raise UserError(task_names.explain_missing(name))
    return TaskEntry(name, weight, found.files, found.stores, weighted, found.documents, found.labels)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def apportion(weights: Sequence[float], slots: int) -> list[int]:
    """Share out `slots` in proportion to positive weights by largest remainder, at least one to each."""
    assert weights
    assert all(weight > 0 for weight in weights), weights
    if len(weights) > slots:
        raise UserError(f"--task-name names {len(weights)} sources: expected at most {slots}; join some with a glob")
    total = math.fsum(weights)
    exact = [weight / total * slots for weight in weights]
    quotas = [max(1, math.floor(share)) for share in exact]
    # Remaining slots go where most is missing; slots lent to tiny weights come back from where it matters least.
    while (rest := slots - sum(quotas)) != 0:
        if rest > 0:
            quotas[max(range(len(quotas)), key=lambda i: (exact[i] - quotas[i], -i))] += 1
        else:
            rich = (i for i in range(len(quotas)) if quotas[i] > 1)
            quotas[min(rich, key=lambda i: ((exact[i] - quotas[i]) / quotas[i], i))] -= 1
    return quotas


class Interleaving:
    """Sample number n -> (source, how many samples that source gave before n), by arithmetic, without end.

    `turns` [cycle] says which source each sample of a cycle is of, and `before` is as in `count_turns`. The next cycle
    goes on with the samples after those of the first, or takes the same again if it `begins_again`.
    """

    def __init__(self, turns: np.ndarray, before: np.ndarray, *, begins_again: bool = False) -> None:
        self._turns = turns
        self._before = before
        self._begins_again = begins_again
        rest = turns[(len(before) - 1) * STRIDE :]
        self.quotas: list[int] = (before[-1] + np.bincount(rest, minlength=before.shape[1])).tolist()

    @classmethod
    def by_quota(cls, quotas: Sequence[int], *, seed: int) -> "Interleaving":
        """Interleave sources in a cycle in which each has its quota of turns.

        They are spread evenly, with a seeded jitter, so that a short run, too, meets the sources in about their
        proportions.
        """
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, CYCLE])))
        keys = [(np.arange(quota) + generator.random_sample(quota)) / quota for quota in quotas]
        sources = np.repeat(np.arange(len(quotas), dtype=np.min_scalar_type(len(quotas))), quotas)
        turns = sources[np.argsort(np.concatenate(keys), kind="stable")]
        return cls(turns, np.concatenate(list(count_turns(turns, len(quotas)))))

    @classmethod
    def by_weight(cls, weights: Sequence[float], *, seed: int) -> "Interleaving":
        """Interleave sources in proportion to weights, over a cycle of 16,384 slots."""
        return cls.by_quota(apportion(weights, CYCLE), seed=seed)

    def locate(self, n: int) -> tuple[int, int]:
        """Return the source of sample n, and n's number among that source's samples."""
        cycle, slot = divmod(n, len(self._turns))
        source = int(self._turns[slot])
        group = slot // STRIDE
        given = np.count_nonzero(self._turns[group * STRIDE : slot] == source)
        first = 0 if self._begins_again else cycle * self.quotas[source]
        return source, first + int(self._before[group][source]) + int(given)

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples are of each source."""
        cycles, slots = divmod(samples, len(self._turns))
        group = slots // STRIDE
        rest = np.bincount(self._turns[group * STRIDE : slots], minlength=len(self.quotas))
        rest += self._before[group]
        return [cycles * quota + int(count) for quota, count in zip(self.quotas, rest, strict=True)]


def count_turns(turns: np.ndarray, sources: int) -> Iterator[np.ndarray]:
    """Yield how many turns each source has had before every 1,024th, int64 [some, sources], some at a time.

    Those between are counted on demand.
    """
    given = np.zeros(sources, np.int64)
    for low in range(0, len(turns), STRIDE * STRIDE):
        piece = turns[low : low + STRIDE * STRIDE]
        starts = np.arange(0, len(piece), STRIDE)
        counts = np.stack([np.add.reduceat(piece == source, starts, dtype=np.int64) for source in range(sources)], 1)
        ends = np.cumsum(counts, axis=0) + given
        yield ends - counts
        given = ends[-1]
