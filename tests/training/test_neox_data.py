"""Runs on data in GPT-NeoX's order: what they are evaluated on, and that a resume goes on in it on another layout."""

import math
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from test_layouts import REPLICAS

from openchatkit.data import options
from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import checkpoint, ledger, metrics
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.stage import Stage
from openchatkit.tools.inspection.verification import verify
from openchatkit.training import config, setup
from openchatkit.training.sinks import format_evaluation
from openchatkit.training.step import Evaluation


@pytest.fixture(scope="module")
def run_flags(flags: dict[str, object]) -> dict[str, object]:
    """Three steps of 8 rows in GPT-NeoX's order, and an evaluation after two of them."""
    names = {name: flags["task_name"] for name in ("evaluation_data", "test_data")}
    order = {"data_order": "neox", "packing": "concat", "loss_on": "all", "mask_end_of_text": True, "seed": 5}
    evaluated = {"evaluation_steps": 2, "evaluation_num_batch": 2}
    return {**flags, **names, **order, **evaluated, "total_steps": 3}


@pytest.fixture(scope="module")
def stopped(run_flags: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run that ended after two steps, to go on."""
    folder = tmp_path_factory.mktemp("stopped")
    ended = ranks.train(folder, {**run_flags, "exit_interval": 2, "checkpoint_path": folder / "ckpt"})
    assert ended.statuses == [75], ended.errors
    return folder / "ckpt"


def go_on(stopped: Path, folder: Path, flags: dict[str, object], **change: object) -> list[str]:
    """Go on in a copy of the run's folder, ckpt in `folder`, with other flags; returns what each rank logged."""
    shutil.copytree(stopped, folder / "ckpt")
    world_size = int(str(change.get("data_group_size", 1)))
    ended = ranks.train(folder, {**flags, **change, "checkpoint_path": folder / "ckpt"}, world_size=world_size)
    assert ended.statuses == [0] * world_size, ended.errors
    return ended.errors


def plain_loss(model: Path, options: DataOptions, task_name: object, first: int, rows: int) -> tuple[float, float]:
    """The loss of the model that is trained, in float64, over some rows, and the tokens of a character in them."""
    shards = LayerShards.open(model)
    stage = Stage(shards.config)
    for shard in stage.shards:
        stage.load(shard, shards.read(shard), dtype=torch.float64)
    batch = build_dataset(str(task_name), options).batch(first, rows)
    logits = stage.logits(stage(batch.tokens)).transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels, ignore_index=-100).item()
    tokenizer, ids = Tokenizer(model), [[token for token in row if token != -100] for row in batch.labels.tolist()]
    texts = [tokenizer.decode(row).replace(tokenizer.end_of_text_token, "") for row in ids]
    return loss, sum(map(len, ids)) / sum(map(len, texts))


def test_each_evaluation_takes_the_rows_that_are_due(tmp_path: Path, run_flags: dict) -> None:
    ended = ranks.train(
        tmp_path, {**run_flags, "lr": 0, "character_perplexity": True, "checkpoint_path": tmp_path / "ckpt"}
    )  # the weights stay as they are
    assert ended.statuses == [0], ended.errors
    data = {"data_order": "neox", "seq_length": 48, "mask_end_of_text": True, "seed": 5}
    cache, model = run_flags["data_cache"], run_flags["model_name"]
    # 3 // 2 + 1 evaluations of two batches of 8 rows, and one test of as many
    wanted = {"evaluation": 32, "test": 16}
    rows = metrics.read(tmp_path / "ckpt")
    found = [(row["step"], name, row) for row in rows for name in wanted if f"{name}_loss" in row]
    assert [(step, name) for step, name, _ in found] == [(2, "evaluation"), (3, "evaluation"), (3, "test")]
    for (_, name, row), first in zip(found, (0, 16, 0), strict=True):
        options = DataOptions(model, data_cache=cache, wanted=wanted[name], rows=8, **data)
        loss, tokens_a_character = plain_loss(model, options, run_flags["task_name"], first, 16)
        assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
        assert row[f"{name}_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        expected = pytest.approx(math.exp(loss * tokens_a_character), rel=1e-4)
        assert row[f"{name}_character_perplexity"] == expected
        assert list(row[f"{name}_sources"]) == [str(run_flags["task_name"])]
    assert found[0][2]["evaluation_loss"] != found[1][2]["evaluation_loss"]
    assert "step 3 | test loss " in ended.errors[0]


def test_an_empty_name_is_no_data_to_evaluate_on(run_flags: dict) -> None:
    empty = dict.fromkeys(("evaluation_data", "test_data"), "") | {"evaluation_steps": 0}
    run = setup.prepare_run(config.parse(ranks.to_argv(run_flags | empty)))
    assert (run.evaluation, run.test) == (None, None)


def test_a_perplexity_that_is_no_number_has_no_value() -> None:
    """As a loss without tokens, or one of weights that have diverged, has it."""
    assert [Evaluation(loss, 1, ()).perplexity for loss in (0.0, 710.0, math.inf)] == [1.0, math.inf, math.inf]
    assert math.isnan(Evaluation(math.nan, 0, ()).perplexity)
    row = {"step": 3, "test_loss": 710.0, "test_perplexity": None, "test_tokens": 4}
    assert format_evaluation(row) == "step 3 | test loss 710"


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 2, "gradient_accumulate_step": 4},
        pytest.param(REPLICAS, marks=pytest.mark.long),
    ],
    ids=["accumulated", "replicas"],
)
def test_a_resume_goes_on_in_the_order_on_another_layout(
    tmp_path: Path, run_flags: dict, stopped: Path, change: dict
) -> None:
    go_on(stopped, tmp_path, run_flags, **change)
    proof = verify(tmp_path / "ckpt")
    assert (proof.steps, proof.samples, len(proof.runs), proof.changed) == (3, 24, 2, False)
    given = checkpoint.read_state(checkpoint.latest(tmp_path / "ckpt"))["settings"]
    whole = build_dataset(given["task_name"], options.from_settings(given))
    digests = [f"{whole.batch(8 * step, 8).digest():016x}" for step in range(3)]
    assert [entry.digest for entry in ledger.read(tmp_path / "ckpt")] == digests


def test_a_resume_names_an_order_that_has_changed(tmp_path: Path, run_flags: dict, stopped: Path) -> None:
    (log,) = go_on(stopped, tmp_path, run_flags, seed=6, data_order="kit")
    for line in (
        "the data, its weights or its order differ from those of ",
        "--data-order was neox up to checkpoint_2 and is kit from here on",
        "--seed was 5 up to checkpoint_2 and is 6 from here on",
    ):
        assert line in log
