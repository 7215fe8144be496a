"""`training/step.py` and `training/pipeline.py`: the same loss, gradients and, where promised, bits in all layouts."""

import json
import math
import shutil
from pathlib import Path

import pytest
import ranks
import torch

from openchatkit.data.batch import Batch
from openchatkit.formats import checkpoint, ledger, metrics
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.shards import shard_names
from openchatkit.models.stage import Stage

STAGES = {"pipeline_group_size": 2}
REPLICAS = {"data_group_size": 2, "batch_size": 4}
INTERLEAVED = {**STAGES, "pp_mode": "interleaved"}
ZERO_BUBBLE = {**STAGES, "pp_mode": "zero-bubble", "activation_checkpointing": "false"}
SHARDED = {**REPLICAS, "dp_mode": "sharded"}
PARTS = {"tensor_group_size": 2}
long = pytest.mark.long  # what `test_matrix.py` and other tests here show as well, of other values
ZERO_BUBBLE_V = {**ZERO_BUBBLE, "pp_mode": "zero-bubble-v"}


def run(folder: Path, flags: dict[str, object], *, environment: dict[str, str] | None = None, **change: object) -> Path:
    """Train; returns the last checkpoint."""
    flags = {**flags, **change, "checkpoint_path": folder / "ckpt"}
    world_size = math.prod(flags.get(f"{axis}_group_size", 1) for axis in ("pipeline", "data", "tensor"))
    ended = ranks.train(folder, flags, world_size=world_size, environment=environment)
    assert ended.statuses == [0] * world_size, ended.errors
    return checkpoint.latest(folder / "ckpt")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all weights and optimizer tensors of a checkpoint."""
    found = {}
    for shard in shard_names(LayerShards(path).config.num_layers):
        found |= {f"{shard}/{name}": t for name, t in checkpoint.read_weights(path, shard).items()}
        for name, entry in checkpoint.read_optimizer(path, shard).items():
            found |= {f"{shard}/{name}/{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return found


def gradients(path: Path) -> dict[str, torch.Tensor]:
    """Return the (clipped) gradients of a run of one step: Adam's first moment is a tenth of them."""
    return {name: t.clone() * 10 for name, t in tensors(path).items() if name.endswith("exp_avg")}


def assert_same_bits(one: Path, other: Path) -> None:
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, flags):
    """A run of one step in one process."""
    return run(tmp_path_factory.mktemp("one"), flags)


@pytest.fixture(scope="module")
def one_process_long(tmp_path_factory, flags):
    """A run of six steps in one process."""
    return run(tmp_path_factory.mktemp("one_long"), flags, total_steps=6)


@pytest.fixture(scope="module")
def packed_flags(flags, chats):
    """Flags of a short run on rows that several documents share, with an evaluation at its end."""
    evaluation = {"evaluation_data": chats, "evaluation_steps": 3, "evaluation_num_batch": 1}
    return {**flags, **evaluation, "packing": "documents", "loss_on": "all", "total_steps": 3}


@pytest.fixture(scope="module")
def packed(tmp_path_factory, packed_flags):
    """A run of three steps in one process on rows that several documents share."""
    return run(tmp_path_factory.mktemp("packed"), packed_flags)


def first_batch(flags: dict[str, object], model: Path) -> Batch:
    """Return the samples of the first step."""
    from openchatkit.data.dataset import build_dataset
    from openchatkit.data.options import DataOptions

    options = {name: flags[name] for name in ("seq_length", "packing", "loss_on")}
    options = DataOptions(model, data_cache=flags["data_cache"], **options)
    return build_dataset(str(flags["task_name"]), options).batch(0, 8)


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_gradients_are_those_of_a_plain_loss(tmp_path, flags, prepared, one_process, packed_flags, packing):
    """The first step's gradient against autograd over the mean of a batch's trained tokens, in float64."""
    if packing == "documents":
        flags, one_process = packed_flags, run(tmp_path, packed_flags, total_steps=1)
    shards = LayerShards.open(prepared["neox"])
    stage = Stage(shards.config)
    for shard in stage.shards:
        stage.load(shard, shards.read(shard), dtype=torch.float64)
    batch = first_batch(flags, prepared["neox"])
    counts = (batch.labels != -100).sum(1)
    if packing == "none":
        assert counts.min() * 2 < counts.max(), "the rows should have very different numbers of trained tokens"
    else:
        assert len(set(batch.document_starts.flatten().tolist())) > 8, "the rows should hold several documents"
    logits = stage.logits(stage(batch.tokens, batch.document_starts)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in stage.parameters()]).norm()
    row = metrics.read(one_process.parent)[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    found = gradients(one_process)
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            expected = parameter.grad * min(1.0, 1.0 / (norm + 1e-6))
            difference = (found[f"{shard}/{name}/exp_avg"] - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max(), (shard, name)


@pytest.mark.parametrize(
    "change",
    [
        STAGES,
        {**STAGES, "pp_mode": "1f1b"},
        {"pipeline_group_size": 4, "pp_mode": "1f1b", "num_layers": 1},
        {"pipeline_group_size": 2, "num_layers": 3},
        REPLICAS,
        {**STAGES, **REPLICAS, "pp_mode": "1f1b"},
        pytest.param({**INTERLEAVED, **REPLICAS}, marks=long),
        pytest.param(SHARDED, marks=long),
        pytest.param(PARTS, marks=long),
        pytest.param({"tensor_group_size": 4}, marks=long),
        {"tensor_group_size": 4, "sequence_parallel": True},
        pytest.param(
            {**PARTS, **SHARDED, "sequence_parallel": True, "activation_checkpointing": "selective"}, marks=long
        ),
        pytest.param({**STAGES, **PARTS, "pp_mode": "1f1b"}, marks=long),
        pytest.param({**REPLICAS, **PARTS}, marks=long),
        pytest.param({**SHARDED, "dp_mode": "sharded-gradients"}, marks=long),
        {**SHARDED, **PARTS, "dp_mode": "sharded-gradients", "gradient_accumulate_step": 2, "batch_size": 2},
        pytest.param({**ZERO_BUBBLE, **SHARDED, **PARTS}, marks=long),
        {"micro_batch_size": 4},
        {"micro_batch_size": 8},
        {"batch_size": 4, "gradient_accumulate_step": 2},
        {"batch_size": 2, "gradient_accumulate_step": 2, "data_group_size": 2},
        {"activation_checkpointing": "false"},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_the_layout(tmp_path, flags, one_process, change):
    path = run(tmp_path, flags, **change)
    expected, found = gradients(one_process), gradients(path)
    assert expected.keys() == found.keys()
    for name in expected:
        assert (expected[name] - found[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    one, other = metrics.read(one_process.parent)[0], metrics.read(path.parent)[0]
    for key in ("loss", "grad_norm"):
        assert other[key] == pytest.approx(one[key], rel=1e-5)
    assert one["trained_tokens"] == other["trained_tokens"]


@pytest.mark.parametrize(
    "change",
    [
        STAGES,
        {**STAGES, "pp_mode": "1f1b"},
        {"batch_size": 4, "gradient_accumulate_step": 2, **STAGES},
        {"activation_checkpointing": "false"},
        {"activation_checkpointing": "selective"},
        pytest.param({"compile": "aot_eager"}, marks=long),
        pytest.param({"compile": "aot_eager", "activation_checkpointing": "selective", **INTERLEAVED}, marks=long),
        INTERLEAVED,
        {**INTERLEAVED, "balance": "auto"},
        ZERO_BUBBLE,
        pytest.param({**ZERO_BUBBLE, "stages_per_rank": 2}, marks=long),
        ZERO_BUBBLE_V,
    ],
    ids=str,
)
def test_same_micro_batches_give_the_same_bits(tmp_path, flags, one_process_long, change):
    assert_same_bits(one_process_long, run(tmp_path, flags, total_steps=6, **change))


@pytest.mark.parametrize(
    "change",
    [STAGES, {**STAGES, "pp_mode": "1f1b", "activation_checkpointing": "false"}, ZERO_BUBBLE_V],
    ids=str,
)
def test_documents_that_share_rows_give_the_same_bits_over_stages(tmp_path, packed_flags, packed, change):
    """Every stage gets the document starts, in training and in evaluation."""
    path = run(tmp_path, packed_flags, **change)
    assert_same_bits(packed, path)
    losses = [metrics.read(one.parent)[-1]["evaluation_loss"] for one in (packed, path)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "change", [REPLICAS, {**STAGES, **REPLICAS, "pp_mode": "1f1b", "micro_batch_size": 1}], ids=str
)
def test_documents_that_share_rows_over_replicas(tmp_path, packed_flags, packed, change):
    path = run(tmp_path, packed_flags, **change)
    for key in ("loss", "grad_norm", "trained_tokens"):
        values = [[row[key] for row in metrics.read(one.parent) if key in row] for one in (packed, path)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    losses = [metrics.read(one.parent)[-1]["evaluation_loss"] for one in (packed, path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("model", ["tied", "gptj"])
def test_other_models(tmp_path, flags, prepared, model):
    """Tied embeddings are trained by the sum of both their gradients, whichever stages hold them."""
    one = run(tmp_path / "one", flags, model_name=prepared[model], total_steps=3)
    two = run(tmp_path / "two", flags, model_name=prepared[model], total_steps=3, pp_mode="1f1b", **STAGES)
    three = run(tmp_path / "three", flags, model_name=prepared[model], total_steps=3, pipeline_group_size=3)
    four = run(tmp_path / "four", flags, model_name=prepared[model], total_steps=3, **ZERO_BUBBLE_V)
    for other in (two, three, four):
        assert_same_bits(one, other)


def test_tied_gradient_is_the_sum_of_both_ends(tmp_path, flags, prepared):
    path = run(tmp_path, flags, model_name=prepared["tied"], max_grad_norm=0)
    shards = LayerShards.open(prepared["tied"])
    stage = Stage(shards.config)
    for shard in stage.shards:
        stored = shards.read(shard)
        if shard == "head":
            stored["embed_out.weight"] = shards.read("embed")["embed_in.weight"]
        stage.load(shard, {name: t.clone() for name, t in stored.items()})
    batch = first_batch(flags, prepared["tied"])
    logits = stage.logits(stage(batch.tokens, batch.document_starts)).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch.labels.flatten()).backward()
    expected = stage.shards["embed"].embed_in.weight.grad + stage.projection.weight.grad
    found = gradients(path)["embed/embed_in.weight/exp_avg"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(name.startswith("head/embed_out") for name in tensors(path))


@pytest.mark.parametrize(
    "change",
    [
        {"bf16": True},
        {"optimizer": "8bit-adam"},
        {"optimizer": "adam"},
        {"optimizer": "sm3", "momentum": 0.9, "bf16": True},
        *(pytest.param({"optimizer": name}, marks=long) for name in ("lion", "madgrad", "sm3")),
    ],
    ids=str,
)
def test_other_precisions_and_optimizers(tmp_path, flags, change):
    one = run(tmp_path / "one", flags, total_steps=3, **change)
    two = run(tmp_path / "two", flags, total_steps=3, **INTERLEAVED, activation_checkpointing="selective", **change)
    assert_same_bits(one, two)
    assert metrics.read(one.parent)[-1]["loss"] < metrics.read(one.parent)[0]["loss"]


def test_the_chosen_precision_is_recorded(tmp_path, flags):
    """auto gives the same bits as the precision that it chooses, given by name."""
    path = run(tmp_path, flags, precision="auto", **STAGES)
    taken = checkpoint.read_state(path)["precision"]
    assert taken in ("bfloat16", "float32")
    assert_same_bits(path, run(tmp_path / "named", flags, precision=taken, **STAGES))


def test_eight_bit_state_is_eight_bit(tmp_path, flags, prepared):
    path = run(tmp_path, flags, optimizer="8bit-adam")
    entry = checkpoint.read_optimizer(path, "embed")["embed_in.weight"]
    assert entry["state1"].dtype == torch.uint8


def test_an_overflow_skips_the_step_on_all_ranks(tmp_path, flags):
    """Where the loss scale overflows float16, no stage takes the step, and the scale falls until steps are taken."""
    start = {"initial_loss_scale": 2.0**24, "hysteresis": 1, "fp16": True, **STAGES}
    path = run(tmp_path, flags, total_steps=12, **start)
    rows = metrics.read(path.parent)
    skipped = [row for row in rows if row["grad_norm"] is None]
    assert 0 < len(skipped) < len(rows)
    assert rows[0]["grad_norm"] is None
    assert rows[-1]["loss_scale"] == 2.0 ** (24 - len(skipped))
    # A skipped step has used its samples all the same, and its row says so.
    entries = ledger.read(path.parent)
    assert [entry.first for entry in entries] == list(range(0, 96, 8))
    assert [entry.step for entry in entries if not entry.applied] == [row["step"] for row in skipped]
    # Adam counts the steps taken: the others changed neither weights nor its state.
    steps = {tensor.item() for name, tensor in tensors(path).items() if name.endswith("/step")}
    assert steps == {len(rows) - len(skipped)}


def test_evaluation_and_metrics(tmp_path, flags, chats):
    change = {"evaluation_data": chats, "evaluation_steps": 2, "evaluation_num_batch": 2, "total_steps": 3}
    one = run(tmp_path / "one", flags, **change)
    two = run(tmp_path / "two", flags, **change, pp_mode="1f1b", **STAGES)
    three = run(
        tmp_path / "three", flags, **{**change, "evaluation_num_batch": 1, "pipeline_group_size": 1}, **REPLICAS
    )
    rows = metrics.read(one.parent)
    assert [row["step"] for row in rows if "evaluation_loss" in row] == [2, 3]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "loss_scale"} <= rows[0].keys()
    assert [row["tokens"] for row in rows if "tokens" in row] == [384, 768, 1152]
    losses = [
        [r["evaluation_loss"] for r in metrics.read(p.parent) if "evaluation_loss" in r] for p in (one, two, three)
    ]
    assert losses[0] == losses[1]
    assert len(losses[2]) == 2
    state = json.loads((one / "state.json").read_text())
    assert (state["step"], state["samples"], state["global_batch"]) == (3, 24, 8)


def test_random_weights_are_those_of_the_seed(tmp_path, flags):
    change = {"load_pretrained_model": "false", "seed": 5}
    one = run(tmp_path / "one", flags, **change)
    two = run(tmp_path / "two", flags, **change, **STAGES)
    assert_same_bits(one, two)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("tied", {}),
        ("neox", {"bf16": True, "optimizer_state": "bf16"}),
        pytest.param("neox", {"bf16": True}, marks=long),
        pytest.param("neox", {"optimizer": "8bit-adam"}, marks=long),
        pytest.param("neox", {"optimizer": "lion"}, marks=long),
        pytest.param("tied", {"optimizer": "madgrad", "bf16": True}, marks=long),
        pytest.param("tied", {"bf16": True}, marks=long),
        pytest.param("tied", {"optimizer": "8bit-adam"}, marks=long),
    ],
    ids=str,
)
def test_shared_state_gives_the_bits_of_plain_replicas(tmp_path, flags, prepared, model, change):
    """Weights, optimizer state, losses and norms, of parameters that two replicas have a run of each."""
    flags = {**flags, "model_name": prepared[model], "total_steps": 4, **change, **REPLICAS}
    plain = run(tmp_path / "plain", flags)
    for name, other in {"sharded": {}, "stages": STAGES}.items():
        shared = run(tmp_path / name, flags, **other, dp_mode="sharded")
        assert_same_bits(plain, shared)
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in metrics.read(plain.parent)] == [row[key] for row in metrics.read(shared.parent)]


@pytest.mark.parametrize(
    "change",
    [
        {"bf16": True},
        *(
            pytest.param(each, marks=long)
            for each in ({}, {"optimizer": "8bit-adam"}, {"optimizer": "lion"}, {"optimizer": "madgrad"})
        ),
    ],
    ids=str,
)
def test_shared_gradients_of_one_pass_give_the_bits_of_plain_replicas(tmp_path, flags, change):
    """With several micro-batches, sums over replicas come before those over micro-batches, and bits may differ."""
    flags = {**flags, "total_steps": 4, "batch_size": 4, "micro_batch_size": 4, "data_group_size": 2, **change}
    plain = run(tmp_path / "plain", flags)
    assert_same_bits(plain, run(tmp_path / "shared", flags, dp_mode="sharded-gradients"))


@pytest.mark.parametrize(
    "change",
    [
        {"bf16": True},
        pytest.param(SHARDED, marks=long),
        pytest.param({"optimizer": "8bit-adam"}, marks=long),
        pytest.param({"optimizer_state": "bf16"}, marks=long),
        pytest.param({"optimizer": "sm3"}, marks=long),
        pytest.param({**SHARDED, "optimizer": "madgrad"}, marks=long),
    ],
    ids=str,
)
def test_offloaded_state_gives_the_same_bits(tmp_path, flags, change):
    """From the start, and going on from a checkpoint of a run that was not."""
    flags = {**flags, **change, "total_steps": 4, "checkpoint_steps": 2}
    here = run(tmp_path / "here", flags)
    assert_same_bits(here, run(tmp_path / "there", flags, use_offload=True))
    shutil.copytree(here.parent / "checkpoint_2", tmp_path / "again" / "ckpt" / "checkpoint_2")
    checkpoint.point_to(tmp_path / "again" / "ckpt", 2)
    assert_same_bits(here, run(tmp_path / "again", flags, use_offload=True))


@pytest.mark.parametrize("model", ["tied", *(pytest.param(name, marks=long) for name in ("neox", "gptj"))])
def test_parts_of_layers_train_as_the_whole(tmp_path, flags, prepared, model):
    """Two steps, so that the second is taken with what the first made; an evaluation at the end."""
    evaluation = {"evaluation_data": flags["task_name"], "evaluation_steps": 2, "evaluation_num_batch": 1}
    flags = {**flags, "model_name": prepared[model], "total_steps": 2, "packing": "documents", **evaluation}
    one = run(tmp_path / "one", flags)
    two = run(tmp_path / "two", flags, activation_checkpointing="selective", **PARTS)
    # A sum of two has the same bits in whichever order.
    four = run(tmp_path / "four", flags, **PARTS, **INTERLEAVED, sequence_parallel=True)
    assert_same_bits(two, four)
    expected, found = tensors(one), tensors(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # Adam divides by the root of the second moment: where gradients are nothing but rounding, so are updates.
        if not name.endswith("exp_avg_sq"):
            allowed = 1e-5 * tensor.abs().max() + (0 if "exp_avg" in name else 2e-5)
            assert (found[name] - tensor).abs().max() <= allowed, name
    for key in ("loss", "grad_norm", "evaluation_loss", "trained_tokens"):
        values = [[row[key] for row in metrics.read(path.parent) if key in row] for path in (one, two)]
        assert values[0]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_random_weights_in_parts_are_those_of_the_whole(tmp_path, flags):
    change = {"load_pretrained_model": "false", "seed": 5, "lr": 0}
    assert_same_weights(run(tmp_path / "one", flags, **change), run(tmp_path / "two", flags, **change, **PARTS))


def assert_same_weights(one: Path, other: Path) -> None:
    weights = [{name: t for name, t in tensors(path).items() if name.count("/") == 1} for path in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.long
@pytest.mark.parametrize("change", [{}, REPLICAS, {**REPLICAS, "dp_mode": "sharded"}, INTERLEAVED], ids=str)
def test_compiled_layers_in_bfloat16_give_the_bits_of_plain_ones(tmp_path, flags, change):
    flags = {**flags, "bf16": True, "total_steps": 3, **change}
    assert_same_bits(run(tmp_path / "plain", flags), run(tmp_path / "compiled", flags, compile="aot_eager"))


@pytest.mark.long
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("change", [{}, {**INTERLEAVED, "activation_checkpointing": "selective"}], ids=str)
def test_compiled_parts_give_the_bits_of_parts(tmp_path, flags, change, sequence_parallel):
    flags = {**flags, **PARTS, "total_steps": 2, "sequence_parallel": sequence_parallel}
    plain = run(tmp_path / "plain", flags)
    assert_same_bits(plain, run(tmp_path / "compiled", flags, compile="aot_eager", **change))
