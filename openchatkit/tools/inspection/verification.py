"""The proof that a training run used each sample exactly once, from the files in its checkpoint folder.

The ledger records the samples of each step and a digest of their content. Here the digests are computed again from the
data, and the newest checkpoint confirms that the ledger is its own. The weights are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit import progress
from openchatkit.data import options
from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.errors import UserError
from openchatkit.formats import cached_store, checkpoint, ledger, metrics
from openchatkit.formats.ledger import LedgerRow
from openchatkit.formats.tokenizer_files import has_tokenizer
from openchatkit.tools.inspection.figures import read_quarantine

PIECE_TOKENS = 1 << 18  # tokens of a batch hashed at a time


@dataclass(frozen=True)
class LedgerRun:
    """Consecutive steps of one start of training."""

    started: str
    layout: str
    first_step: int
    last_step: int
    samples: int


@dataclass(frozen=True)
class Proof:
    """A proof: steps 1 to `steps` trained on samples 0 to `samples` - 1, each once, in these runs.

    `trained_tokens` of their labels counted in the loss. `unused` of the samples changed no weight, because the
    gradient of their steps was not finite. `later` rows of the ledger come after the checkpoint. `changed`: the data
    are no longer those of the last run, though these samples are.
    """

    checkpoint: Path
    steps: int
    samples: int
    trained_tokens: int
    unused: int
    runs: tuple[LedgerRun, ...]
    later: int
    changed: bool


def verify(path: Path, *, tokenizer: Path | None = None, cache_dir: Path | None = None) -> Proof:
    """Prove that every sample up to the newest checkpoint in `path` was trained on exactly once.

    `tokenizer` and `cache_dir` replace those that the run had.
    UserError names the first step that differs, what was expected and what was found.
    """
    newest = checkpoint.locate(path)
    root, state = newest.parent, checkpoint.read_state(newest)
    if state.get("ledger") is None:
        raise UserError(f"{newest} is of a run that began before training kept a ledger: nothing can be verified")
    steps, rows_a_step = state["step"], state["global_batch"]
    entries = ledger.read(root)
    up_to = [entry for entry in entries if entry.step <= steps]
    _check_steps(up_to, steps, rows_a_step)
    dataset = build_dataset(state["settings"]["task_name"], restore_options(newest, state, tokenizer, cache_dir))
    _check_rows(dataset)
    altered = ledger.chain(up_to) != state["ledger"]
    trained = _check_digests(
        up_to, dataset, trained=_read_trained(root), blame=_explain_difference(dataset, state, altered=altered)
    )
    if altered:
        raise UserError(
            f"not verified: {root / ledger.LEDGER}: up to step {steps} expected rows that hash to "
            f"{state['ledger'][:16]}..., as {newest.name} recorded, found {ledger.chain(up_to)[:16]}...: "
            "a row was altered, or is another run's"
        )
    _check_totals(newest, state)  # last: for rows of another length, the error above names the step
    return Proof(
        checkpoint=newest,
        steps=steps,
        samples=steps * rows_a_step,
        trained_tokens=trained,
        unused=sum(entry.count for entry in up_to if not entry.applied),
        runs=tuple(runs(up_to)),
        later=len(entries) - len(up_to),
        changed=dataset.fingerprint != state["data"],
    )


def _check_steps(entries: Sequence[LedgerRow], steps: int, rows_a_step: int) -> None:
    """Raise UserError unless these are steps 1 to `steps`, each on the `rows_a_step` samples after those before."""
    for step in range(1, max(steps, len(entries)) + 1):
        entry = entries[step - 1] if step <= len(entries) else None
        if entry is None:
            raise _step_error(step, "its row in the ledger", f"the last one to be of step {step - 1}")
        if entry.step != step:
            raise _step_error(step, "its row in the ledger" if step <= steps else "no row", f"one of step {entry.step}")
        first = (step - 1) * rows_a_step
        if (entry.first, entry.count) != (first, rows_a_step):
            expected = f"samples {first} to {first + rows_a_step - 1}"
            raise _step_error(step, expected, f"{entry.first} to {entry.first + entry.count - 1}")


def _check_rows(dataset: Dataset) -> None:
    """Raise UserError unless every row of every store is a document or is listed as set aside."""
    for source in dataset.sources:
        for store in source.stores:
            folder = store.prefix.parent
            record = cached_store.read_record(folder)
            if record is None or store.prefix != cached_store.folder_prefix(folder):
                continue  # a store made elsewhere has no record of rows
            path = cached_store.quarantine_path(folder)
            listed = read_quarantine(path)[0] if path.exists() else 0
            if (store.documents, listed) != (record.rows - record.quarantined, record.quarantined):
                raise UserError(
                    f"not verified: {folder}: expected {record.rows} rows, {record.quarantined} set aside, found "
                    f"{store.documents} documents and {listed} rows set aside: delete the folder, it is built again"
                )


def _check_digests(entries: Sequence[LedgerRow], dataset: Dataset, *, trained: dict[int, int], blame: str) -> int:
    """Compute every step's digest from the data, and return the number of labels that train.

    `trained` is each step's own count, where it is known; `blame` is the explanation if a step differs.
    """
    total = 0
    with progress.bar(sum(entry.count for entry in entries), "verifying", unit="sample") as bar:
        for entry in entries:
            digest, counted = hash_samples(dataset, entry.first, entry.count)
            if digest != entry.digest:
                raise _step_error(entry.step, f"samples with digest {entry.digest}", f"{digest}: {blame}")
            if (known := trained.get(entry.step, counted)) != counted:
                raise _step_error(entry.step, f"{known} trained tokens, as {metrics.METRICS} says", str(counted))
            total += counted
            bar.update(entry.count)
    return total


def runs(entries: Sequence[LedgerRow]) -> list[LedgerRun]:
    """Return the runs of these rows, in order."""
    found: list[LedgerRun] = []
    for entry in entries:
        last = found[-1] if found else None
        if last is not None and (last.started, last.layout) == (entry.started, entry.layout):
            found[-1] = LedgerRun(last.started, last.layout, last.first_step, entry.step, last.samples + entry.count)
        else:
            found.append(LedgerRun(entry.started, entry.layout, entry.step, entry.step, entry.count))
    return found


def _step_error(step: int, expected: str, found: str) -> UserError:
    return UserError(f"not verified: step {step}: expected {expected}, found {found}")


def restore_options(newest: Path, state: dict[str, Any], tokenizer: Path | None, cache_dir: Path | None) -> DataOptions:
    """Return how the run of a checkpoint read its data, with another tokenizer or cache if they are given."""
    settings = dict(state["settings"])
    if tokenizer is not None:
        settings["tokenizer_name"] = tokenizer
    elif not Path(settings["tokenizer_name"]).is_dir() and has_tokenizer(newest):
        settings["tokenizer_name"] = newest  # the model has been moved; the checkpoint holds a copy
    if cache_dir is not None:
        settings["data_cache"] = cache_dir
    return options.from_settings(settings)


def _check_totals(newest: Path, state: dict[str, Any]) -> None:
    """Raise UserError unless state.json counts steps x rows samples, and samples x length tokens."""
    samples = state["step"] * state["global_batch"]
    expected = {"samples": samples, "tokens": samples * state["settings"]["seq_length"]}
    for name, value in expected.items():
        if state[name] != value:
            raise UserError(
                f"not verified: {newest}: expected {state['step']} steps of {state['global_batch']} samples to make "
                f"{value} {name}, found {state[name]}"
            )


def _read_trained(root: Path) -> dict[int, int]:
    """Return how many tokens each step recorded as trained on; nothing where a crash has damaged the file."""
    try:
        return {row["step"]: row["trained_tokens"] for row in metrics.read(root) if "trained_tokens" in row}
    except ValueError:
        return {}


def _explain_difference(dataset: Dataset, state: dict[str, Any], *, altered: bool) -> str:
    """Return the explanation for data that do not fit the ledger."""
    if altered:
        return "the ledger was altered, or is another run's"
    if dataset.fingerprint != state["data"]:
        return "the data or the tokenizer have changed since they were trained on"
    return "the data were changed between runs, after this step"


def hash_samples(dataset: Dataset, first: int, count: int) -> tuple[str, int]:
    """Return the digest of some samples, as in the ledger, and how many of their labels train."""
    rows = max(1, PIECE_TOKENS // dataset.seq_length)
    total = counted = 0
    for start in range(first, first + count, rows):
        batch = dataset.batch(start, min(rows, first + count - start))
        total += batch.digest()
        counted += int((batch.labels != IGNORE).sum())
    return f"{total % (1 << 64):016x}", counted
