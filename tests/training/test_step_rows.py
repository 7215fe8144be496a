"""The rows of a step in `training/step.py`: read ahead of it, and with padding as one document."""

import pytest
import torch

from openchatkit.data import options
from openchatkit.data.batch import Batch
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.stage import Stage
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.precision import LossScaler
from openchatkit.training.step import Schedule, Trainer
from openchatkit.training.weights import Weights

CPU = torch.device("cpu")


def load(path) -> Stage:
    shards = LayerShards.open(path)
    stage = Stage(shards.config)
    for shard in stage.shards:
        stage.load(shard, shards.read(shard), dtype=torch.float32)
    return stage


def make_trainer(path, *, total_steps: int) -> Trainer:
    weights = Weights(LocalStages({0: load(path)}), Layout(0, CPU), dtype=torch.float32)
    weights.optimizer = build_optimizer("adamw", weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return Trainer(
        weights,
        LossScaler(1.0, dynamic=False),
        Schedule(4, 2, LearningRates(1e-3, total_steps), total_steps, 1.0),
        dtype=torch.float32,
        pp_mode="gpipe",
        micro_batch_size=2,
        seq_length=48,
    )


@pytest.fixture(scope="module")
def dataset(flags) -> Dataset:
    keys = {"task_name", "data_cache", "seq_length", "loss_on"}
    settings = {key: flags[key] for key in keys} | {"tokenizer_name": flags["model_name"], "packing": "documents"}
    return build_dataset(str(flags["task_name"]), options.from_settings(settings))


class Recorded:
    """A data set that notes what is read of it, and cannot read from sample number `broken` on."""

    def __init__(self, dataset: Dataset, broken: int = 1 << 30) -> None:
        self.dataset, self.sources, self.broken = dataset, dataset.sources, broken
        self.read: list[int] = []

    def batch(self, first: int, count: int) -> Batch:
        self.read.append(first)
        if first >= self.broken:
            raise UserError(f"sample {first} cannot be read")
        return self.dataset.batch(first, count)


def masters(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.stages.parameters()]


def test_rows_are_read_once_in_order_and_none_after_the_last_step(prepared, dataset):
    training, evaluation = Recorded(dataset), Recorded(dataset)
    trainer = make_trainer(prepared["neox"], total_steps=3)
    found = []
    for number in range(3):
        found.append(trainer.step(number, training))
        trainer.evaluate(evaluation, 2)
    assert training.read == [0, 4, 8, 12, 16, 20]
    assert evaluation.read == [0, 4] * 3
    assert [result.digest for result in found] == [dataset.batch(8 * step, 8).digest() for step in range(3)]


def test_a_reader_s_error_is_that_of_the_step_which_needs_the_rows(prepared, dataset):
    broken = Recorded(dataset, broken=16)
    trainer, unbroken = (make_trainer(prepared["neox"], total_steps=9) for _ in range(2))
    for number in range(2):
        trainer.step(number, broken)
        unbroken.step(number, dataset)
    with pytest.raises(UserError, match="sample 16 cannot be read"):
        trainer.step(2, broken)
    assert all(torch.equal(one, other) for one, other in zip(masters(trainer), masters(unbroken), strict=True))


@pytest.mark.parametrize("kind", ["neox", "gptj"])
def test_padding_as_one_document_gives_the_same_bits(prepared, dataset, kind):
    plain = dataset.batch(0, 8)
    merged = plain.merge_padding()
    assert not torch.equal(merged.document_starts, plain.document_starts), "the rows have no padding"
    results = []
    for batch in (plain, merged):
        stage = load(prepared[kind])
        loss = VocabularyLoss(stage.projection)(stage(batch.tokens, batch.document_starts), batch.labels)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in stage.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
