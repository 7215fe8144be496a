"""`training/ledger_writer.py` and the losses by source of `training/step.py`: which data each step was trained on."""

import itertools
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from test_layouts import REPLICAS, STAGES, run
from test_resume import LONG, interrupted

from openchatkit.data import options
from openchatkit.data.batch import Batch
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, ledger, metrics
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.stage import Stage
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.ledger_writer import LedgerWriter
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.setup import RunProgress
from openchatkit.training.step import Schedule, Trainer
from openchatkit.training.weights import Weights


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, flags, chats) -> dict[str, object]:
    """Flags of a run on three sources, of which the third is too rare to be in every step."""
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("short", "rare"):
        rows = [f"<human>: Say {name} {i}.\n<bot>: {name} {i}\n" for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {**flags, "task_name": f"{chats}:2,{folder / 'short.jsonl'}:1,{folder / 'rare.jsonl'}:0.1"}


def dataset_of(path: Path) -> Dataset:
    """Return the data set of a checkpoint's run."""
    settings = checkpoint.read_state(path)["settings"]
    return build_dataset(settings["task_name"], options.from_settings(settings))


def assert_proven(path: Path, samples: int) -> list[ledger.LedgerRow]:
    """Each sample is in just one row, rows have the data set's digests, and the checkpoint has their chain."""
    entries, dataset = ledger.read(path.parent), dataset_of(path)
    assert [entry.step for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0].first == 0
    assert all(one.first + one.count == other.first for one, other in itertools.pairwise(entries))
    assert entries[-1].first + entries[-1].count == samples
    for entry in entries:
        assert entry.digest == f"{dataset.batch(entry.first, entry.count).digest():016x}", entry
    assert checkpoint.read_state(path)["ledger"] == ledger.chain(entries)
    return entries


@pytest.mark.parametrize(
    "change",
    [
        {},
        {**STAGES, "pp_mode": "1f1b", "packing": "documents"},
        REPLICAS,
        {**STAGES, "batch_size": 2, "micro_batch_size": 1, "gradient_accumulate_step": 2, "data_group_size": 2},
    ],
    ids=str,
)
def test_losses_by_source_are_those_of_a_plain_loss(tmp_path, mixed, change):
    path = run(tmp_path, mixed, total_steps=2, evaluation_data=mixed["task_name"], evaluation_steps=2, **change)
    shards, dataset = LayerShards.open(mixed["model_name"]), dataset_of(path)
    stage = Stage(shards.config)
    for shard in stage.shards:
        stage.load(shard, shards.read(shard), dtype=torch.float64)
    batch = dataset.batch(0, 8)
    logits = stage.logits(stage(batch.tokens, batch.document_starts)).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="none")
    steps = [row for row in metrics.read(path.parent) if "loss" in row]
    assert steps[0]["sources"].keys() == {source.name for source in dataset.sources}
    for number, source in enumerate(dataset.sources):
        own = batch.sources == number
        trained = (batch.labels[own] != -100).sum().item()
        found = steps[0]["sources"][source.name]
        assert found["trained_tokens"] == trained
        if trained:
            assert found["loss"] == pytest.approx(losses[own].sum().item() / trained, rel=1e-6)
        else:
            assert found["loss"] is None
    assert len(dataset.sources) == 3
    assert None in [found["loss"] for row in steps for found in row["sources"].values()]
    evaluation = metrics.read(path.parent)[-1]
    for row, prefix in [*((row, "") for row in steps), (evaluation, "evaluation_")]:
        found = row[f"{prefix}sources"].values()
        total = sum((source["loss"] or 0) * source["trained_tokens"] for source in found)
        tokens = row["evaluation_tokens" if prefix else "trained_tokens"]
        assert sum(source["trained_tokens"] for source in found) == tokens
        assert total / tokens == pytest.approx(row[f"{prefix}loss"], rel=1e-6)
    assert_proven(path, 16)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_ledger_proves_a_run_that_was_killed_and_resumed_on_another_layout(tmp_path, flags, victim):
    interrupted(tmp_path, flags, signal.SIGKILL, [victim])
    step = int(checkpoint.latest(tmp_path / "ckpt").name.removeprefix("checkpoint_"))
    assert_proven_up_to(tmp_path / "ckpt", step)
    # As if the kill had hit the writing of a row.
    with open(tmp_path / "ckpt" / ledger.LEDGER, "a") as file:
        file.write('{"step": 17, "first": 1')
    folder, flags = tmp_path / "again", {**flags, **LONG, "checkpoint_path": tmp_path / "ckpt", **REPLICAS}
    ended = ranks.train(folder, flags, world_size=2)
    assert ended.statuses == [0, 0], ended.errors
    assert "is not the ledger" not in ended.errors[0]
    entries = assert_proven(checkpoint.latest(tmp_path / "ckpt"), 60 * 8)
    layouts = ["pipeline 2 x data 1, batch 8 x 1"] * step + ["pipeline 1 x data 2, batch 4 x 1"] * (60 - step)
    assert [entry.layout for entry in entries] == layouts


def assert_proven_up_to(folder: Path, step: int) -> None:
    """A killed run's ledger goes at least to its last checkpoint, which has its chain."""
    entries = [entry for entry in ledger.read(folder) if entry.step <= step]
    assert len(entries) == step
    assert checkpoint.read_state(checkpoint.checkpoint_path(folder, step))["ledger"] == ledger.chain(entries)


def test_a_lost_ledger_is_a_warning_and_starts_again(tmp_path, flags):
    path = run(tmp_path, flags, total_steps=4, checkpoint_steps=2)
    (path.parent / ledger.LEDGER).unlink()
    (path.parent / "latest").write_text("2\n")
    again = {**flags, "total_steps": 4, "checkpoint_steps": 2, "checkpoint_path": path.parent}
    ended = ranks.train(tmp_path / "again", again)
    assert ended.statuses == [0], ended.errors
    assert "is not the ledger of the checkpoint at step 2: tools/inspect_data.py --verify will not" in ended.errors[0]
    entries = ledger.read(path.parent)
    assert [entry.step for entry in entries] == [3, 4]
    assert checkpoint.read_state(path)["ledger"] == ledger.chain(entries)


@pytest.mark.parametrize(("chain", "warned"), [(None, False), (ledger.EMPTY, True)])
def test_a_checkpoint_from_before_the_ledger_is_no_reason_to_warn(tmp_path, capsys, chain, warned):
    layout, schedule = Layout(0, torch.device("cpu")), Schedule(8, 1, LearningRates(0.1, 9), 9, 1.0)
    result = SimpleNamespace(digest=(1 << 64) - 1, applied=True)
    for progress in (RunProgress(), RunProgress(3, 100, chain)):
        writer = LedgerWriter(tmp_path, progress, layout, schedule)
        for step in range(progress.step + 1, progress.step + 4):
            writer.add(step, 8, result)
        found = writer.sync()
        writer.close()
    assert ("is not the ledger" in capsys.readouterr().err) == warned
    entries = ledger.read(tmp_path)
    assert [(entry.first, entry.count, entry.digest) for entry in entries] == [(8 * i, 8, "f" * 16) for i in range(6)]
    assert found == ledger.chain(entries)


@dataclass(frozen=True)
class ReadSlowly:
    """Make rank 1 take its time to read a batch."""

    seconds: float

    def __call__(self) -> None:
        read = Dataset.batch

        def batch(self_: Dataset, first: int, rows: int) -> Batch:
            time.sleep(self.seconds if dist.get_rank() == 1 else 0)
            return read(self_, first, rows)

        Dataset.batch = batch


def test_the_wait_for_rows_is_the_mean_over_all_ranks(tmp_path, flags):
    flags = {**flags, "checkpoint_path": tmp_path / "ckpt", "data_group_size": 2, "batch_size": 4}
    ended = ranks.train(tmp_path, flags, world_size=2, before_main=ReadSlowly(1.0))
    assert ended.statuses == [0, 0], ended.errors
    [row] = [row for row in metrics.read(tmp_path / "ckpt") if "data_seconds" in row]
    assert row["data_seconds"] > 0.5, "rank 0, which reports it, has not waited at all"


def test_stages_with_different_samples_do_not_take_the_step(flags, prepared):
    """As on two machines whose token stores differ in tokens that no fingerprint covers."""
    shards = LayerShards.open(prepared["neox"])
    stage = Stage(shards.config)
    for shard in stage.shards:
        stage.load(shard, shards.read(shard))
    layout = Layout(0, torch.device("cpu"))
    place = {"pp_mode": "gpipe", "micro_batch_size": 2, "seq_length": 48}
    trainer = Trainer(
        Weights(LocalStages({0: stage}), layout, dtype=torch.float32),
        None,
        Schedule(8, 1, LearningRates(0.1, 9), 9, 1.0),
        dtype=torch.float32,
        **place,
    )
    # Of two stages; without a process group the other's digest counts as 0.
    trainer.layout = Layout(0, torch.device("cpu"), pipeline_size=2)
    trainer.weights.reduce_gradients()  # zeros, where there is none
    with pytest.raises(UserError, match="was fed other samples than another rank"):
        trainer._sum_over_ranks(torch.zeros(()), (False, False), 12345)
