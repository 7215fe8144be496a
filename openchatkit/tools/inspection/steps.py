"""The samples that a step of a run was taken on, found by its ledger, and the steps whose losses jump."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, ledger, metrics
from openchatkit.tools.inspection import verification


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step, which `dataset` has as the run was given them; `row` is the step's in metrics.jsonl."""

    step: int
    samples: range
    row: dict[str, Any]
    dataset: Dataset
    tokenizer: Tokenizer


def find_samples(path: Path, step: int, *, tokenizer: Path | None = None, cache_dir: Path | None = None) -> StepSamples:
    """Return the samples of a step of the run whose checkpoints are in `path`.

    `tokenizer` and `cache_dir` replace those that the run had. UserError for a step that the ledger does not have, or
    whose samples the data no longer hold.
    """
    newest = checkpoint.locate(path)
    state = checkpoint.read_state(newest)
    entries = {entry.step: entry for entry in ledger.read(newest.parent)}
    if step not in entries:
        known = f"has steps {min(entries)} to {max(entries)}" if entries else "has none"
        raise UserError(f"--step {step}: {newest.parent / ledger.LEDGER} {known}")
    entry = entries[step]
    options = verification.restore_options(newest, state, tokenizer, cache_dir)
    dataset = build_dataset(state["settings"]["task_name"], options)
    digest, _ = verification.hash_samples(dataset, entry.first, entry.count)
    if digest != entry.digest:
        raise UserError(
            f"--step {step}: its samples hashed to {entry.digest}, and those of the data now to {digest}: the data or "
            "the tokenizer have changed since"
        )
    samples = range(entry.first, entry.first + entry.count)
    return StepSamples(step, samples, _read_rows(newest.parent).get(step, {}), dataset, Tokenizer(options.tokenizer))


def list_jumps(path: Path) -> list[dict[str, Any]]:
    """Return the rows in metrics.jsonl of the steps whose loss jumps; UserError where there is no such file."""
    root = path if (path / metrics.METRICS).exists() else path.parent
    if not (root / metrics.METRICS).exists():
        raise UserError(f"{path} has no {metrics.METRICS}: expected the --checkpoint-path of a run")
    return [row for row in _read_rows(root).values() if "jump" in row]


def _read_rows(root: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of steps in metrics.jsonl; UserError where one is damaged."""
    try:
        return {row["step"]: row for row in metrics.read(root) if "loss" in row}
    except ValueError as error:
        raise UserError(f"{error}: restore it, or resume the run, which leaves such lines out") from error
