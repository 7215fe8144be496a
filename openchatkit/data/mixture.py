"""The mixture: which sources `--task-name` names with which weights, and which of them sample number n comes from.

Weights are shares of sequences, as in the original kit. Sources take turns by quota, not by chance: a cycle of slots is
shared out in proportion to the weights and repeats for ever, so sample n's source, and how many samples that source
has given before, are arithmetic.
"""

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openchatkit import paths
from openchatkit.data import records
from openchatkit.errors import UserError

CYCLE = 1 << 14


@dataclass(frozen=True)
class Part:
    """One entry of `--task-name`: as it was written, the files it stands for, and its weight."""

    name: str
    files: tuple[Path, ...]
    weight: float


def parse(task_names: str, *, flag: str = "--task-name") -> list[Part]:
    """The parts of `path[:weight],path[:weight]`; a path may be a glob, whose files are one source together.

    A name without its `.gz` or `.zst` finds the compressed file. UserError, naming `flag`, for a bad weight or a
    missing file.
    """
    entries = [entry.strip() for entry in task_names.split(",")]
    try:
        parts = [_part(entry) for entry in entries if entry]
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if not parts:
        raise UserError(f"{flag} names no data: expected path[:weight],path[:weight]")
    return parts


def _part(entry: str) -> Part:
    if entry.startswith(("http://", "https://", "s3://")):
        raise UserError(f"{entry} is an address: download the file and pass its path")
    # A path may itself hold colons, so what is there as it stands is a path and nothing else.
    files = _files(entry)
    if files:
        return Part(entry, files, 1.0)
    name, _, text = entry.rpartition(":")
    files, weight = _files(name.strip()), _number(text)
    if not files:
        raise UserError(_missing(entry if weight is None or not name else name.strip()))
    if weight is None or not math.isfinite(weight) or weight <= 0:
        raise UserError(f"{name} has the weight {text!r}: expected a number above 0 (or leave the file out)")
    return Part(name.strip(), files, weight)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _files(name: str) -> tuple[Path, ...]:
    """The files that a path or a glob stands for, sorted; none if there are none."""
    if not name:
        return ()
    for candidate in (name, f"{name}.gz", f"{name}.zst"):
        if Path(candidate).is_file():
            return (Path(candidate),)
    if glob.has_magic(name):
        return tuple(path for path in map(Path, sorted(glob.glob(name, recursive=True))) if path.is_file())
    return ()


def _missing(name: str) -> str:
    """What to say of a path at which there is no file: what is there instead, and the command that brings it."""
    path = Path(name)
    if path.is_dir():
        return f"{name} is a folder: pass its files, for example {path / '*.jsonl'}"
    folder = path.parent
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(records.RECORD_SUFFIXES))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        found = f"{folder} holds {', '.join(names[:5]) or 'no jsonl file'}{more}"
    else:
        found = f"there is no folder {folder}"
    return f"no file {name} ({found}){_fetch(folder)}"


def _fetch(folder: Path) -> str:
    """The command that fills a folder such as `data/OIG/files`, if it is one of ours."""
    script = Path("data") / folder.parent.name / "prepare.py"
    if folder.name != "files" or not (paths.ROOT / script).is_file():
        return ""
    return f": run `python {script}` first"


def apportion(weights: Sequence[float], slots: int) -> list[int]:
    """`slots` shared out in proportion to positive weights by largest remainder, at least one to each."""
    assert weights
    assert all(weight > 0 for weight in weights), weights
    if len(weights) > slots:
        raise UserError(f"--task-name names {len(weights)} sources: expected at most {slots}; join some with a glob")
    total = math.fsum(weights)
    exact = [weight / total * slots for weight in weights]
    quotas = [max(1, math.floor(share)) for share in exact]
    # Slots still to give go where most is missing; those lent to tiny weights come back from where it matters least.
    while (rest := slots - sum(quotas)) != 0:
        if rest > 0:
            quotas[max(range(len(quotas)), key=lambda i: (exact[i] - quotas[i], -i))] += 1
        else:
            rich = (i for i in range(len(quotas)) if quotas[i] > 1)
            quotas[min(rich, key=lambda i: ((exact[i] - quotas[i]) / quotas[i], i))] -= 1
    return quotas


class Interleaving:
    """Sample number n -> (source, how many samples that source gave before n), by arithmetic, for ever.

    Within the cycle each source's turns are spread evenly, with a seeded jitter, so that a short run, too, meets the
    sources in about their proportions.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.quotas = apportion(weights, CYCLE)
        generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, CYCLE])))
        keys = [(np.arange(quota) + generator.random_sample(quota)) / quota for quota in self.quotas]
        sources = np.repeat(np.arange(len(weights)), self.quotas)
        self._source = sources[np.argsort(np.concatenate(keys), kind="stable")]
        self._before = np.empty(CYCLE, np.int64)
        for source, quota in enumerate(self.quotas):
            self._before[self._source == source] = np.arange(quota)

    def locate(self, n: int) -> tuple[int, int]:
        """The source of sample n, and n's number among that source's samples."""
        cycle, slot = divmod(n, CYCLE)
        source = int(self._source[slot])
        return source, cycle * self.quotas[source] + int(self._before[slot])
