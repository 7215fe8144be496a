"""What models with options ask of training: relative biases that all layers share, and dropout by sample and place."""

import dataclasses
import shutil

import pytest
import ranks
import torch
from test_layouts import assert_same_bits, run
from torch.func import functional_call

from openchatkit.data import options
from openchatkit.data.dataset import build_dataset
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import metrics
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.neox import NeoxLayer
from openchatkit.models.registry import config_from_hf
from openchatkit.models.shards import layer_name
from openchatkit.models.stage import Stage
from openchatkit.training import config
from openchatkit.training.balance import measure_head
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.plan.planner import plan_run
from openchatkit.training.precision import LossScaler
from openchatkit.training.prediction import measure_parts
from openchatkit.training.step import Schedule, Trainer
from openchatkit.training.weights import Weights

CPU = torch.device("cpu")
TABLE = "attention.rpe.weight"
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def load(path, **changes) -> Stage:
    """The model of a folder, with other options."""
    shards = LayerShards.open(path)
    config = dataclasses.replace(shards.config, options=dataclasses.replace(shards.config.options, **changes))
    stage = Stage(config)
    for shard in stage.shards:
        stage.load(shard, shards.read(shard), dtype=torch.float32)
    return stage


def make_trainer(stage, *, micro_batch_size=2) -> Trainer:
    weights = Weights(LocalStages({0: stage}), Layout(0, CPU), dtype=torch.float32)
    weights.optimizer = build_optimizer("adamw", weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return Trainer(
        weights,
        LossScaler(1.0, dynamic=False),
        Schedule(4, 2, LearningRates(1e-3, 2), 2, 1.0),
        dtype=torch.float32,
        pp_mode="gpipe",
        micro_batch_size=micro_batch_size,
        seq_length=48,
    )


@pytest.fixture(scope="module")
def dataset(flags):
    keys = {"task_name", "data_cache", "seq_length", "loss_on"}
    settings = {key: flags[key] for key in keys} | {"tokenizer_name": flags["model_name"], "packing": "documents"}
    return build_dataset(str(flags["task_name"]), options.from_settings(settings))


NOTHING = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def name_tables(stage):
    return [f"shards.{layer_name(number)}.{TABLE}" for number in range(stage.config.num_layers)]


def test_each_layers_biases_get_the_gradient_of_one_table(prepared):
    """Against autograd through one tensor that all layers use."""
    stage, tokens = load(prepared["dropout"], **NOTHING), torch.arange(96).view(2, 48)
    names, shared = name_tables(stage), {name: p.detach().clone() for name, p in stage.named_parameters()}
    for parameter in shared.values():
        parameter.requires_grad_()
    table = shared[names[0]]
    functional_call(stage, shared | dict.fromkeys(names, table), tokens).square().mean().backward()
    weights = Weights(LocalStages({0: stage}), Layout(0, CPU), dtype=torch.float32)
    stage(tokens).square().mean().backward()
    weights.reduce_gradients()
    for name in names:
        torch.testing.assert_close(stage.get_parameter(name).grad, table.grad, rtol=0, atol=1e-6 * table.grad.max())
        assert torch.equal(stage.get_parameter(name).grad, stage.get_parameter(names[0]).grad)
    # In the norm, it is one parameter.
    squares = sum(p.grad.double().square().sum() for p in shared.values() if p.grad is not None)
    assert float(weights.squared_norms().sum()) == pytest.approx(float(squares), rel=1e-5)


def test_biases_are_float32_where_products_are_not(prepared):
    """A gradient of theirs is a sum over all pairs of a row's tokens."""
    stage = load(prepared["dropout"])
    Weights(LocalStages({0: stage}), Layout(0, CPU), dtype=torch.bfloat16)
    assert all(stage.get_parameter(name).dtype == torch.float32 for name in name_tables(stage))
    assert stage.shards[layer_name(0)].attention.dense.weight.dtype == torch.bfloat16


def test_nothing_is_dropped_in_evaluations(prepared, dataset):
    dropping, plain = (make_trainer(load(prepared["dropout"], **changes)) for changes in ({}, NOTHING))
    found, expected = (trainer.evaluate(dataset, 2) for trainer in (dropping, plain))
    assert found.loss == expected.loss
    assert dropping.step(0, dataset).loss != pytest.approx(plain.step(0, dataset).loss, rel=1e-4)


def test_a_step_drops_the_same_in_micro_batches_of_any_size(prepared, dataset):
    results = [make_trainer(load(prepared["dropout"]), micro_batch_size=size).step(0, dataset) for size in (1, 2, 4)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)


def test_stages_recomputation_and_a_resume_drop_the_same(tmp_path, flags, prepared):
    flags = {**flags, "model_name": prepared["dropout"], "packing": "documents", "total_steps": 2}
    one = run(tmp_path / "one", flags, activation_checkpointing="none", checkpoint_steps=1)
    folder = tmp_path / "two" / "ckpt"
    shutil.copytree(one.parent / "checkpoint_1", folder / "checkpoint_1")
    (folder / "latest").write_text("1\n")
    two = run(tmp_path / "two", flags, pipeline_group_size=2, activation_checkpointing="full")
    assert_same_bits(one, two)
    assert metrics.read(two.parent)[-1]["loss"] == metrics.read(one.parent)[-1]["loss"]


def test_a_layer_drops_out_where_its_time_is_measured(flags, prepared):
    given = config.parse(ranks.to_argv({**flags, "model_name": prepared["dropout"]}))
    keys = []

    def note(module, inputs):
        if isinstance(module, NeoxLayer):
            keys.append(inputs[3].keys)

    model = load(prepared["dropout"]).config
    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        measure_parts(given, plan_run(given, model), Layout(0, CPU))
        measured = len(keys)
        measure_head(model, CPU, rows=1, length=8, dtype=torch.float32, recompute=False)
    assert 0 < measured < len(keys)
    assert all(each is not None for each in keys)


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        (
            {"pos_emb": "rpe", "tie_word_embeddings": False},
            {"dp_mode": "sharded-gradients", "data_group_size": 2, "world_size": 2},
            "--dp-mode sharded-gradients: the model's layers share their relative biases; use --dp-mode sharded",
        ),
        (
            {"pos_emb": "alibi"},
            {"dp_mode": "sharded-gradients", "data_group_size": 2, "world_size": 2},
            "--dp-mode sharded-gradients: the model's embeddings are tied; use --dp-mode sharded",
        ),
        (
            {"attention_config": ["local", "global", "global", "global"]},
            {"seq_length": 56},
            "--seq-length 56: blocks of the model's sparse attention have 16 tokens; use 48, or",
        ),
    ],
)
def test_models_that_a_run_cannot_train(options, flags, message):
    model = config_from_hf(SIZES | {"model_type": "neox", **options})
    given = {"model_name": "m", "task_name": "d.jsonl", "total_steps": 1, "seq_length": 48} | flags
    with pytest.raises(UserError) as error:
        plan_run(config.parse(ranks.to_argv(given)), model)
    assert str(error.value).startswith(message)
