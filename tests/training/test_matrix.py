"""Layouts of all axes together against one process: each pair of values of two axes is in some run of the matrix.

Ten steps: losses, gradient norms and weights. Equal to the bit where nothing but stages, schedules, recomputing or
offloading differs from one process, or shared state from plain replicas; else to a hundred-thousandth.
"""

import itertools
import random
from pathlib import Path

import pytest
import ranks
import torch
from test_layouts import assert_same_bits, tensors

from openchatkit.formats import checkpoint, metrics

AXES: dict[str, tuple[object, ...]] = {
    "model": ("neox", "tied", "gptj", "options", "dropout"),
    # Of two ranks, but for the first value.
    "pipeline": ("one rank", "gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"),
    "replicas": ("one rank", "allreduce", "sharded", "sharded-gradients", "sharded-parameters"),
    "tensor": ("one rank", "two ranks", "two ranks, tokens split"),
    "precision": ("float32", "bfloat16", "float16"),
    "activation_checkpointing": ("none", "full", "selective"),
    "packing": ("none", "documents"),
    "compile": ("no", "aot_eager"),
    "optimizer_state": ("float32", "bf16", "8bit"),
    "use_offload": ("false", "true"),
    "activation_offload": ("false", "true"),
    "gradient_accumulate_step": (1, 2),
}


def fits(row: dict[str, object]) -> bool:
    """Whether a run can have these values, as far as they are there."""
    if row.get("replicas") == "sharded-parameters":
        excluded = {"optimizer_state": "8bit", "use_offload": "true"}
        if row.get("pipeline", "one rank") != "one rank" or any(row.get(k) == v for k, v in excluded.items()):
            return False
    return not (
        (str(row.get("pipeline")).startswith("zero") and row.get("activation_checkpointing", "none") != "none")
        or (str(row.get("pipeline")).startswith("zero") and row.get("activation_offload") == "true")
        or (str(row.get("pipeline")).startswith("zero") and row.get("compile", "no") != "no")
        or (row.get("replicas") == "sharded-gradients" and row.get("pipeline", "one rank") != "one rank")
        or (row.get("activation_offload") == "true" and row.get("activation_checkpointing", "full") == "none")
        or (row.get("replicas") == "sharded-gradients" and row.get("model") in ("tied", "dropout"))
        or (row.get("optimizer_state") == "8bit" and row.get("tensor", "one rank") != "one rank")
    )


def cover_pairs() -> list[dict[str, object]]:
    """Return few rows such that any two values of two axes that fit together are in one of them, chosen greedily."""
    pairs = {
        ((one, x), (two, y))
        for (one, xs), (two, ys) in itertools.combinations(AXES.items(), 2)
        for x, y in itertools.product(xs, ys)
        if fits({one: x, two: y})
    }
    generator, rows = random.Random(0), []
    while pairs:
        best: tuple[int, dict[str, object]] = (-1, {})
        for _ in range(200):
            row = dict(min(pairs)) if _ == 0 else dict(generator.choice(sorted(pairs, key=str)))
            for axis in generator.sample(list(AXES), len(AXES)):
                fitting = [value for value in AXES[axis] if axis not in row and fits({**row, axis: value})]
                row |= {axis: generator.choice(fitting)} if fitting else {}
            if set(row) == set(AXES) and fits(row):
                best = max(best, (len(pairs & pairs_of(row)), row), key=lambda found: found[0])
        assert best[0] > 0, sorted(pairs, key=str)
        rows.append({axis: best[1][axis] for axis in AXES})
        pairs -= pairs_of(best[1])
    return rows


def pairs_of(row: dict[str, object]) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    return set(itertools.combinations([(axis, row[axis]) for axis in AXES], 2))


ROWS = cover_pairs()


def train(folder: Path, flags: dict[str, object], row: dict[str, object]) -> Path:
    row, flags = dict(row), {**flags, "total_steps": 10, "checkpoint_path": folder / "ckpt"}
    size, batches = 1, row["gradient_accumulate_step"]
    for axis, group, mode in (
        ("pipeline", "pipeline_group_size", "pp_mode"),
        ("replicas", "data_group_size", "dp_mode"),
        ("tensor", "tensor_group_size", None),
    ):
        value = row.pop(axis)
        if value != "one rank":
            flags[group] = 2
            size *= 2
            flags |= {mode: value} if mode else {"sequence_parallel": value.endswith("split")}
    # The same rows a step, whatever the layout.
    del row["model"]
    row["compile"] = None if row["compile"] == "no" else row["compile"]
    flags |= {**row, "batch_size": 16 // flags.get("data_group_size", 1) // batches}
    ended = ranks.train(folder, flags, world_size=size)
    assert ended.statuses == [0] * size, ended.errors
    return checkpoint.latest(folder / "ckpt")


def test_the_matrix_has_every_pair():
    wanted = {
        frozenset([(one, x), (two, y)])
        for (one, xs), (two, ys) in itertools.combinations(AXES.items(), 2)
        for x, y in itertools.product(xs, ys)
        if fits({one: x, two: y})
    }
    assert wanted == {frozenset(pair) for row in ROWS for pair in pairs_of(row)}
    assert len(ROWS) < 40


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value) for value in row.values()))
def test_layouts_against_one_process(tmp_path, flags, prepared, row):
    flags = {**flags, "model_name": prepared[str(row["model"])], "lr": 1e-4, "initial_loss_scale": 64}
    alone = {**row, **dict.fromkeys(("pipeline", "replicas", "tensor"), "one rank")}
    alone |= {
        "activation_checkpointing": "none",
        "use_offload": "false",
        "activation_offload": "false",
        "compile": "no",
    }
    one, found = train(tmp_path / "one", flags, alone), train(tmp_path / "found", flags, row)
    if row["replicas"] == row["tensor"] == "one rank":
        assert_same_bits(one, found)
    if row["replicas"] == "sharded":
        assert_same_bits(found, train(tmp_path / "plain", flags, {**row, "replicas": "allreduce"}))
    near = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[str(row["precision"])]
    if row["optimizer_state"] == "bf16" and row["tensor"] != "one rank":
        near = max(near, 1e-3)  # moments are rounded at random, by the place in a part
    for key in ("loss", "grad_norm", "trained_tokens"):
        values = [[each[key] for each in metrics.read(path.parent)] for path in (one, found)]
        assert len(values[0]) == 10
        assert values[0] == pytest.approx(values[1], rel=near), key
    if row["precision"] == "float32" and row["optimizer_state"] == "float32":
        expected, weights = tensors(one), tensors(found)
        assert expected.keys() == weights.keys()
        for name, tensor in expected.items():
            if name.count("/") == 1:
                # Where a gradient is nothing but rounding, Adam may take any step up to the learning rate's size.
                typical = (weights[name] - tensor).abs().median()
                assert typical <= 1e-5 * tensor.abs().max(), name
                assert torch.isfinite(weights[name]).all()
