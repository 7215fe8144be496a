"""`training/fully_sharded.py`: replicas that share parameters against one process, in steps, checkpoints and memory."""

import dataclasses
import functools
import gc
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import gloo_ranks
import pytest
import ranks
import torch
import torch.distributed as dist
from model_configs import NEOX
from test_layouts import assert_same_bits, run, tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import metrics
from openchatkit.models.config import ModelConfig
from openchatkit.models.shards import HEAD
from openchatkit.models.stage import Stage
from openchatkit.training import config
from openchatkit.training.fully_sharded import FullyShardedWeights, MatrixSharding, own_rows
from openchatkit.training.gradients import gradient_of
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.precision import autocast
from openchatkit.training.setup import _share_parameters
from openchatkit.training.weights import Weights

REPLICAS = {"data_group_size": 2, "batch_size": 4}
SHARED = {**REPLICAS, "dp_mode": "sharded-parameters"}
# Of one micro-batch a step, and without clipping, sums over two replicas have the bits of plain replicas.
EXACT = {"micro_batch_size": 4, "max_grad_norm": 0}
CONFIG = dataclasses.replace(NEOX, vocab_size=101, num_layers=6, init_std=0.1)
# Of rows that three replicas cannot share evenly: the last one has none of some matrices.
SMALL = dataclasses.replace(CONFIG, hidden_size=4, num_heads=2, rotary_dim=2, intermediate_size=4, num_layers=1)
long = pytest.mark.long


def assert_near(one: Path, other: Path, *, near: float = 1e-5) -> None:
    """The same losses, gradient norms and weights of two runs, but for the order of sums."""
    for key in ("loss", "grad_norm", "trained_tokens", "evaluation_loss"):
        values = [[row[key] for row in metrics.read(path.parent) if key in row] for path in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=near), key
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if name.count("/") == 1 and near == 1e-5:
            # Where a gradient is nothing but rounding, Adam may take any step up to the learning rate's size.
            typical = (found[name] - tensor).abs().median()
            assert typical <= near * tensor.abs().max(), name
        assert torch.isfinite(found[name]).all()


def test_steps_are_those_of_one_process(tmp_path, flags, chats):
    """With rows that documents share, layers computed again, two batches a step, and an evaluation."""
    flags = {**flags, "packing": "documents", "loss_on": "all", "total_steps": 10, "lr": 1e-4}
    flags |= {"evaluation_data": chats, "evaluation_steps": 5, "evaluation_num_batch": 1}
    one = run(tmp_path / "one", flags, gradient_accumulate_step=2)
    found = run(tmp_path / "found", flags, gradient_accumulate_step=2, **SHARED)
    assert_near(one, found)


@pytest.mark.parametrize(
    "change",
    [
        {"bf16": True},
        pytest.param({}, marks=long),
        pytest.param({"bf16": True, "activation_checkpointing": "selective"}, marks=long),
        pytest.param({"bf16": True, "optimizer_state": "bf16", "compile": "aot_eager"}, marks=long),
        pytest.param({"fp16": True, "initial_loss_scale": 64, "loss_scale_window": 2}, marks=long),
    ],
    ids=str,
)
def test_where_sums_are_the_same_so_are_the_bits_of_plain_replicas(tmp_path, flags, change):
    """In half precision as well: matrices are rounded as they are there, and nothing else. Compiled layers, too."""
    change = {**EXACT, "total_steps": 4, **change}
    plain = run(tmp_path / "plain", flags, **{**REPLICAS, **change, "compile": None})
    found = run(tmp_path / "found", flags, **{**SHARED, **change})
    assert_same_bits(plain, found)


@long
@pytest.mark.parametrize("model", ["neox", "tied", "gptj"])
@pytest.mark.parametrize(
    "change",
    [
        {"data_group_size": 4, "batch_size": 2},
        {"tensor_group_size": 2},
        {"tensor_group_size": 2, "sequence_parallel": True, "activation_checkpointing": "selective"},
    ],
    ids=str,
)
def test_models_and_tensor_groups_against_one_process(tmp_path, flags, prepared, model, change):
    flags = {**flags, "model_name": prepared[model], "total_steps": 10, "lr": 1e-4}
    assert_near(run(tmp_path / "one", flags), run(tmp_path / "found", flags, **{**SHARED, **change}))


@long
@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_against_one_process(tmp_path, flags, precision, near):
    flags = {**flags, "precision": precision, "total_steps": 10, "lr": 1e-4, "initial_loss_scale": 64}
    assert_near(run(tmp_path / "one", flags), run(tmp_path / "found", flags, **SHARED), near=near)


@long
def test_an_overflow_changes_nothing_on_any_replica(tmp_path, flags):
    """The loss scale is far too large for the first steps, and falls as it does in one process."""
    flags = {**flags, "fp16": True, "initial_loss_scale": 2.0**40, "hysteresis": 1, "total_steps": 30}
    rows = [metrics.read(run(tmp_path / name, flags, **change).parent) for name, change in (("1", {}), ("2", SHARED))]
    scales = [[row["loss_scale"] for row in each] for each in rows]
    assert scales[0] == scales[1]
    assert min(scales[0]) < 2.0**36


@long
def test_a_run_goes_on_in_other_layouts_and_back(tmp_path, flags):
    """From shared parameters to plain replicas and back with the same bits, and over one process to a millionth."""
    flags = {**flags, **EXACT, "total_steps": 6, "checkpoint_steps": 2, "keep_checkpoints": 3}
    whole = run(tmp_path / "whole", flags, **REPLICAS)
    moved = run_in_turns(tmp_path / "moved", flags, SHARED, REPLICAS, SHARED)
    assert_same_bits(whole, moved)
    four = {**SHARED, "data_group_size": 4, "batch_size": 2, "micro_batch_size": 2}
    through = run_in_turns(tmp_path / "through", flags, SHARED, {}, four)
    expected, found = tensors(whole), tensors(through)
    for name, tensor in expected.items():
        if name.count("/") == 1:
            assert (found[name] - tensor).abs().median() <= 1e-6, name


def run_in_turns(folder: Path, flags: dict[str, object], *changes: dict[str, object]) -> Path:
    """Train in one layout after the other, each of which goes on two steps after the one before began."""
    for number, change in enumerate(changes):
        if number:
            kept = 2 * number
            for step in range(kept + 1, 7):
                shutil.rmtree(folder / "ckpt" / f"checkpoint_{step}", ignore_errors=True)
            (folder / "ckpt" / "latest").write_text(f"{kept}\n")
        last = run(folder, {**flags, **change})
    return last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline_group_size": 2}, "--pipeline-group-size 2 exclude each other: a pipeline would gather"),
        ({"optimizer": "8bit-adam"}, "8-bit optimizer state exclude each other: a block of it is no number of rows"),
        ({"use_offload": "true"}, "--use-offload exclude each other: rows are updated in place"),
        ({"check_replicas": 5}, "--check-replicas exclude each other: replicas have norms and biases alone in common"),
    ],
    ids=str,
)
def test_what_shared_parameters_exclude_is_named(change, message):
    given = {"model_name": "m", "task_name": "d", "total_steps": 1, **SHARED, **change}
    with pytest.raises(UserError) as error:
        config.parse(ranks.to_argv(given))
    assert str(error.value).startswith("--dp-mode sharded-parameters and")
    assert message in str(error.value)


def test_layers_that_gpus_are_to_gather_by_gloo_are_refused():
    settings = config.parse(
        ranks.to_argv(
            {
                "model_name": "m",
                "task_name": "d",
                "total_steps": 1,
                **SHARED,
                "micro_batch_size": 4,
                "dp_backend": "gloo",
            }
        )
    )
    layout = Layout(0, torch.device("cuda"), replicas=2, data=object())
    with pytest.raises(UserError, match="--dp-backend gloo exclude each other: layers are gathered on the GPUs"):
        _share_parameters(settings, layout, torch.float32)
    assert _share_parameters(settings, Layout(0, torch.device("cuda")), torch.float32) is None, "one has all anyway"


def build(
    rank: int, model: ModelConfig, dtype: torch.dtype = torch.float32, watch: Callable[[], None] | None = None
) -> FullyShardedWeights:
    """Weights of a random model on a rank of `gloo_ranks`, all of which are replicas."""
    layout = Layout(rank, torch.device("cpu"), replicas=dist.get_world_size(), data=dist.group.WORLD)
    sharding = MatrixSharding(layout, dtype)

    def cut(shard: str, module: nn.Module) -> None:
        for action in (watch, functools.partial(sharding.cut, shard, module), watch):
            if action is not None:
                action()

    with torch.device("meta"):
        stages = LocalStages({0: Stage(model)}, on_filled=cut)
    stages.init_weights(1, layout.device)
    return with_optimizer(FullyShardedWeights(stages, layout, sharding))


def with_optimizer(weights):
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    weights.optimizer = build_optimizer("adamw", weights, **options)
    return weights


def take_step(weights, tokens: Tensor, labels: Tensor, *, trained: int) -> Tensor:
    """Take one step of a micro-batch for each row; returns the squared norms."""
    [stage] = weights.stages
    loss = VocabularyLoss(stage.projection)
    for row, label in zip(tokens, labels, strict=True):
        loss(stage(row.unsqueeze(0)), label.unsqueeze(0), scale=1 / trained).backward()
    weights.reduce_gradients()
    norms = weights.squared_norms()
    weights.step(0.5, 1e-2)
    weights.drop_gradients()
    return norms


def draw(model: ModelConfig, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, of which the last two rows have none to train on."""
    tokens = torch.randint(model.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[-2:] = -100
    return tokens, labels


def step_and_gather(rank: int) -> list[object]:
    """Two steps of two rows, of which the last replica trains on none, and all shards as they are saved."""
    weights = build(rank, SMALL)
    tokens, labels = draw(SMALL, 6)
    own = slice(2 * rank, 2 * rank + 2)
    norms = [take_step(weights, tokens[own], labels[own], trained=64) for _ in range(2)]
    return [norms, {shard: weights.gather(shard) for shard in weights.stages.shards}]


@long
def test_replicas_without_rows_or_trained_tokens(tmp_path):
    """Against whole weights in one process; state that is loaded is what is saved again."""
    stage = Stage(SMALL)
    stage.init_weights(1)
    one = with_optimizer(Weights(LocalStages({0: stage}), Layout(0, torch.device("cpu")), dtype=torch.float32))
    expected = [take_step(one, *draw(SMALL, 6), trained=64) for _ in range(2)]
    results = gloo_ranks.run(step_and_gather, 3, tmp_path)
    for norms, _ in results:
        for each, known in zip(norms, expected, strict=True):
            torch.testing.assert_close(each, known, rtol=1e-5, atol=0)
    for number, shard in enumerate(one.stages.shards):
        writers = [shards[shard] for _, shards in results if shards[shard] is not None]
        assert [shards[shard] is not None for _, shards in results] == [number % 3 == rank for rank in range(3)]
        for name, (weight, state) in one.gather(shard).items():
            found, found_state = writers[0][name]
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(found_state[key], state[key], rtol=1e-4, atol=1e-7)


def measure(dtype: torch.dtype, rank: int) -> dict[str, int]:
    """Bytes that a rank holds, while shards are whole one at a time: as it is filled, trains and evaluates."""
    filling: list[int] = []
    gc.freeze()
    weights = build(rank, CONFIG, dtype, lambda: filling.append(count_live_bytes()))
    [stage] = weights.stages
    whole: list[set[str]] = []

    def note(*_: object) -> None:
        whole.append({name for name, p in parameters(stage) if p.dim() > 1 and not isinstance(p, DTensor)})

    for module in stage.shards.values():
        module.register_forward_pre_hook(note)
        module.register_forward_hook(note)
    for _, parameter in parameters(stage):
        if parameter.dim() == 1:
            parameter.register_post_accumulate_grad_hook(note)  # amid the shard's backward pass
    tokens, labels = draw(CONFIG, 4)
    loss = VocabularyLoss(stage.projection)
    with autocast(torch.device("cpu"), dtype):
        loss(stage(tokens), labels, scale=0.01).backward()
        weights.reduce_gradients()
        gradients = [own_rows(gradient_of(parameter)) for _, parameter in parameters(stage)]
        weights.step(1.0, 1e-3)
        weights.drop_gradients()
        with torch.no_grad():
            loss(stage(tokens), labels)
    assert [each for each in whole if HEAD in each]
    assert max(len(each - {HEAD}) for each in whole) == 1
    note()
    weights.release_copies()
    note()
    assert whole[-2:] == [{HEAD}, set()]
    return {
        "filling": max(filling),
        "parameters": sum(own_rows(each).untyped_storage().nbytes() for _, each in parameters(stage)),
        "gradients": sum(each.nbytes for each in gradients),
        "moments": sum(
            each.nbytes for state in weights.optimizer.state.values() for each in state.values() if each.dim()
        ),
    }


def parameters(stage: Stage) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a stage as they are at the moment, each with its shard."""
    return [(shard, parameter) for shard, module in stage.named_shards() for parameter in module.parameters()]


def count_live_bytes() -> int:
    """Bytes of all tensors that Python knows of, but for those from before `gc.freeze`."""
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in (each.untyped_storage() for each in found)}.values())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=long)])
def test_a_rank_holds_its_share_and_one_layer(tmp_path, dtype):
    """16 bytes a parameter over the replicas, and the vectors whole."""
    replicas = 3
    with torch.device("meta"):
        shards = {shard: list(module.parameters()) for shard, module in Stage(CONFIG).named_shards()}
    matrices = [p for each in shards.values() for p in each if p.dim() > 1]
    vectors = sum(p.nbytes for each in shards.values() for p in each if p.dim() == 1)
    share = vectors + sum(math.ceil(len(p) / replicas) * p[0].nbytes for p in matrices)
    one_shard = max(sum(p.nbytes for p in each) for each in shards.values())
    for rank, found in enumerate(gloo_ranks.run(functools.partial(measure, dtype), replicas, tmp_path)):
        own = vectors + sum(len(torch.arange(len(p)).chunk(replicas)[rank]) * p[0].nbytes for p in matrices)
        assert found["parameters"] == share
        assert found["gradients"] == own
        assert found["moments"] == 2 * own
        assert one_shard < found["filling"] <= share + one_shard
