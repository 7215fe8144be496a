"""`tools.inspection.verification`: the ledgers it accepts, and the first step at which it refuses one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.options import from_settings
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, ledger, metrics
from openchatkit.formats.ledger import LEDGER, LedgerRow
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import shard_names
from openchatkit.tools.inspection import verification
from openchatkit.tools.inspection.command import main
from openchatkit.tools.inspection.steps import find_samples
from openchatkit.tools.inspection.verification import LedgerRun, verify

STEPS, ROWS, LENGTH = 10, 4, 24
MODEL = {
    "model_type": "gpt_neox",
    "vocab_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "rotary_pct": 1.0,
}


@pytest.fixture
def settings(tiny_tokenizer: Path, tmp_path: Path) -> dict[str, Any]:
    """What a run of two sources, one in quarantine, writes down of itself."""
    for name in ("a", "b"):
        rows = [{"text": f"<human>: What is {n}?\n<bot>: The answer is {name} {n}.\n"} for n in range(40)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("{broken\n")
    return {
        "task_name": f"{tmp_path}/a.jsonl:2,{tmp_path}/b.jsonl",
        "tokenizer_name": str(tiny_tokenizer),
        "data_cache": str(tmp_path / "cache"),
        "seq_length": LENGTH,
        "seed": 5,
        "packing": "concat",
        "loss_on": "responses",
        "mixture_unit": "sequences",
        "document_separator": "end-of-text",
        "bad_rows": "quarantine",
        "evaluation_data": "nowhere.jsonl",
    }


@pytest.fixture
def dataset(settings: dict[str, Any]) -> Dataset:
    return build_dataset(settings["task_name"], from_settings(settings))


@pytest.fixture
def entries(dataset: Dataset) -> list[LedgerRow]:
    """The rows of a run that was stopped after step 4 and continued in another layout, with two rows at the end that no
    checkpoint vouches for."""
    made = []
    for step in range(1, STEPS + 3):
        first = (step - 1) * ROWS
        layout, started = ("2 stages x 1 replica", "9:00") if step <= 4 else ("1 stage x 2 replicas", "9:30")
        made.append(LedgerRow(step, first, ROWS, f"{dataset.batch(first, ROWS).digest():016x}", True, layout, started))
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "ckpts"


@pytest.fixture
def write(root: Path, settings: dict[str, Any], dataset: Dataset, entries: list[LedgerRow]) -> Callable[..., None]:
    """Write a checkpoint that vouches for `entries`, and a ledger of `rows`."""

    def write(rows: list[LedgerRow], tokenizer: Path | None = None, **state: object) -> None:
        state = {
            "step": STEPS,
            "tokens": STEPS * ROWS * LENGTH,
            "samples": STEPS * ROWS,
            "global_batch": ROWS,
            "data": dataset.fingerprint,
            "ledger": ledger.chain(entries[:STEPS]),
            "settings": settings,
        } | state
        config = config_from_hf(MODEL)
        temporary = checkpoint.begin(root, STEPS)
        records = [
            checkpoint.write_weights(
                temporary,
                shard,
                {name: torch.zeros(shape) for name, shape in family(config).parameter_shapes(config, shard).items()},
            )
            for shard in shard_names(config.num_layers)
        ]
        checkpoint.finish(
            temporary, root, STEPS, state=state, records=records, raw_config=MODEL, tokenizer_from=tokenizer
        )
        (root / LEDGER).write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")

    return write


def refused(root: Path) -> str:
    with pytest.raises(UserError) as error:
        verify(root)
    return str(error.value)


def test_samples_trained_on_once_are_proved(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], dataset: Dataset
) -> None:
    write(entries[:STEPS])
    proof = verify(root)
    assert (proof.checkpoint, proof.steps, proof.samples, proof.later) == (root / "checkpoint_10", 10, 40, 0)
    assert proof.runs == (
        LedgerRun("9:00", "2 stages x 1 replica", 1, 4, 16),
        LedgerRun("9:30", "1 stage x 2 replicas", 5, 10, 24),
    )
    assert proof.trained_tokens == (dataset.batch(0, 40).labels >= 0).sum()
    assert not proof.changed
    assert verify(root / "checkpoint_10") == proof


def test_samples_of_steps_without_effect_are_counted(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [replace(entry, applied=entry.step not in (2, 5, 11)) for entry in entries]
    write(rows, ledger=ledger.chain(rows[:STEPS]))
    assert verify(root).unused == 2 * ROWS
    with pytest.raises(SystemExit):
        main(["--verify", "--checkpoint-path", str(root)])
    assert capsys.readouterr().out.endswith(
        "each trained exactly once, by 2 runs; 8 of them to no effect, since the gradient of their steps was not "
        "finite\n"
    )


def test_large_steps_are_hashed_in_pieces(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(entries[:STEPS])
    proof = verify(root)
    monkeypatch.setattr(verification, "PIECE_TOKENS", 3 * LENGTH)
    assert verify(root) == proof


def test_rows_after_the_checkpoint_are_ignored(
    root: Path, write: Callable[..., None], entries: list[LedgerRow]
) -> None:
    write([*entries, entries[-1]])
    with open(root / LEDGER, "a") as file:
        file.write('{"step": 13, "fir')
    proof = verify(root)
    assert (proof.steps, proof.later) == (10, 3)


def swapped(rows: list[LedgerRow]) -> None:
    rows[2], rows[3] = rows[3], rows[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(6), "step 7: expected its row in the ledger, found one of step 8"),
        (lambda rows: rows.pop(), "step 10: expected its row in the ledger, found the last one to be of step 9"),
        (lambda rows: rows.clear(), "step 1: expected its row in the ledger, found the last one to be of step 0"),
        (lambda rows: rows.insert(5, rows[4]), "step 6: expected its row in the ledger, found one of step 5"),
        (lambda rows: rows.append(rows[9]), "step 11: expected no row, found one of step 10"),
        (swapped, "step 3: expected its row in the ledger, found one of step 4"),
        (
            lambda rows: rows.__setitem__(5, replace(rows[5], first=21)),
            "step 6: expected samples 20 to 23, found 21 to 24",
        ),
        (
            lambda rows: rows.__setitem__(5, replace(rows[5], count=5)),
            "step 6: expected samples 20 to 23, found 20 to 24",
        ),
    ],
)
def test_steps_and_samples_must_follow_one_another(
    root: Path,
    write: Callable[..., None],
    entries: list[LedgerRow],
    change: Callable[[list[LedgerRow]], object],
    message: str,
) -> None:
    rows = entries[:STEPS]
    change(rows)
    write(rows)
    assert message in refused(root)


def test_a_digest_that_was_altered(root: Path, write: Callable[..., None], entries: list[LedgerRow]) -> None:
    rows = entries[:STEPS]
    rows[7] = replace(rows[7], digest="0123456789abcdef")
    write(rows)
    assert refused(root) == (
        f"not verified: step 8: expected samples with digest 0123456789abcdef, found {entries[7].digest}: "
        "the ledger was altered, or is another run's"
    )


def test_an_altered_row_with_the_right_samples(
    root: Path, write: Callable[..., None], entries: list[LedgerRow]
) -> None:
    rows = entries[:STEPS]
    rows[7] = replace(rows[7], layout="8 stages x 9 replicas")
    write(rows)
    assert "up to step 10 expected rows that hash to" in refused(root)


def test_data_that_changed_since(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], settings: dict[str, Any]
) -> None:
    write(entries[:STEPS])
    path = Path(settings["task_name"].split(":")[0])
    path.write_text(path.read_text().replace("The", "This"))
    message = refused(root)
    assert message.startswith("not verified: step 1: expected samples with digest")
    assert message.endswith("the data or the tokenizer have changed since they were trained on")


def test_data_that_changed_only_in_later_samples(
    root: Path, write: Callable[..., None], entries: list[LedgerRow]
) -> None:
    write(entries[:STEPS], data="0" * 64)
    assert verify(root).changed


def test_data_that_changed_between_two_runs(root: Path, write: Callable[..., None], entries: list[LedgerRow]) -> None:
    rows = [replace(entry, digest=f"{entry.step:016x}") if entry.step <= 4 else entry for entry in entries[:STEPS]]
    write(rows, ledger=ledger.chain(rows))
    message = refused(root)
    assert message.endswith("the data were changed between runs, after this step")
    write(rows, ledger=ledger.chain(rows), tokens=700)  # rows were shorter, too
    assert refused(root) == message


def test_totals_must_agree(root: Path, write: Callable[..., None], entries: list[LedgerRow]) -> None:
    write(entries[:STEPS], tokens=959)
    assert "expected 10 steps of 4 samples to make 960 tokens, found 959" in refused(root)
    write(entries[:STEPS], samples=44)
    assert "to make 40 samples, found 44" in refused(root)


def test_metrics_must_agree(root: Path, write: Callable[..., None], entries: list[LedgerRow], dataset: Dataset) -> None:
    write(entries[:STEPS])
    trained = int((dataset.batch(8, 4).labels >= 0).sum())
    metrics.append(root, {"step": 3, "trained_tokens": trained})
    metrics.append(root, {"step": 3, "evaluation_loss": 1.0})
    verify(root)
    metrics.append(root, {"step": 4, "trained_tokens": 0})
    assert "step 4: expected 0 trained tokens, as metrics.jsonl says, found " in refused(root)


def test_every_row_is_a_document_or_set_aside(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], tmp_path: Path
) -> None:
    write(entries[:STEPS])
    (listed,) = (tmp_path / "cache").glob("*/quarantine.jsonl")
    listed.write_text("")
    assert "expected 41 rows, 1 set aside, found 40 documents and 0 rows set aside" in refused(root)


def test_a_checkpoint_from_before_the_ledger(root: Path, write: Callable[..., None], entries: list[LedgerRow]) -> None:
    write(entries[:STEPS], ledger=None)
    assert "began before training kept a ledger" in refused(root)


def test_a_tokenizer_that_was_moved_is_taken_from_the_checkpoint(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], settings: dict[str, Any], tiny_tokenizer: Path
) -> None:
    write(entries[:STEPS], tokenizer=tiny_tokenizer, settings=settings | {"tokenizer_name": "moved/away"})
    assert verify(root).steps == STEPS
    assert verify(root, tokenizer=tiny_tokenizer).steps == STEPS


def test_the_command(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], capsys: pytest.CaptureFixture[str]
) -> None:
    write(entries[:STEPS])
    with pytest.raises(SystemExit) as end:
        main(["--verify", "--checkpoint-path", str(root)])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert [line.split() for line in printed.splitlines() if "replica" in line] == [
        ["9:00", "2", "stages", "x", "1", "replica", "1", "to", "4", "16"],
        ["9:30", "1", "stage", "x", "2", "replicas", "5", "to", "10", "24"],
    ]
    assert printed.endswith("verified: 10 steps, 40 samples, each trained exactly once, by 2 runs\n")


def test_the_command_refuses_in_one_line(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], capsys: pytest.CaptureFixture[str]
) -> None:
    write(entries[1:STEPS])
    for flags, message in (
        ([], "step 1: expected its row in the ledger, found one of step 2"),
        (["--seed", "1"], "--seed does not go with --verify, which takes it from the checkpoint: leave it out"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["--verify", "--checkpoint-path", str(root), *flags])
        assert end.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert len(printed.err.splitlines()) == 1


def test_the_samples_of_a_step_are_shown_as_it_was_given_them(
    root: Path, write: Callable[..., None], entries: list[LedgerRow], dataset: Dataset, capsys: pytest.CaptureFixture
) -> None:
    write(entries)
    jump = {"usual_loss": 3.0, "first_sample": 20, "last_sample": 23}
    for step in (5, 6):
        row = {"step": step, "loss": 1.0 + step, "sources": {}}
        metrics.append(root, row if step == 5 else {**row, "jump": jump})
    metrics.append(root, {"step": 6, "evaluation_loss": 2.0})

    def shown(*flags: str) -> tuple[int | None, str]:
        with pytest.raises(SystemExit) as end:
            main(["--checkpoint-path", str(root), *flags])
        printed = capsys.readouterr()
        return end.value.code, printed.out + printed.err

    assert shown("--jumps") == (0, "step 6: samples 20 to 23; loss 7.000, usually 3.000\n")
    status, printed = shown("--step", "6")
    assert status == 0
    assert printed.startswith("step 6: samples 20 to 23, as its ledger says; loss 7.000, usually 3.000\n")
    titles = [line for line in printed.splitlines() if line.lstrip().startswith("sample ")]
    assert [int(title.split()[1].rstrip(",")) for title in titles] == [20, 21, 22, 23]
    trained = sum(int((dataset.batch(number, 1).labels != IGNORE).sum()) for number in range(20, 24))
    assert sum(int(title.split(": ")[1].split()[0]) for title in titles) == trained
    assert "samples 44 to 47, as its ledger says\n" in shown("--step", "12")[1], "which no checkpoint vouches for"
    assert shown("--step", "13") == (2, f"error: --step 13: {root / LEDGER} has steps 1 to 12\n")


def test_samples_of_a_step_that_the_data_no_longer_hold_are_not_shown(
    root: Path, write: Callable[..., None], entries: list[LedgerRow]
) -> None:
    write([replace(entry, digest="0" * 16) if entry.step == 6 else entry for entry in entries])
    with pytest.raises(UserError, match=r"--step 6: its samples hashed to 0000000000000000, and those of the data now"):
        find_samples(root, 6)
