"""`training/norms.py`: norms of layers in any layout are those of what its checkpoint holds."""

import math

import pytest
from test_layouts import PARTS, SHARDED, STAGES, run

from openchatkit.formats import checkpoint, metrics
from openchatkit.models.shards import shard_names

long = pytest.mark.long


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("tied", SHARDED),
        pytest.param("neox", {**STAGES, "optimizer": "lion", "bf16": True}, marks=long),
        pytest.param("tied", {**PARTS, "optimizer_state": "bf16"}, marks=long),
        pytest.param("neox", {**SHARDED, "dp_mode": "sharded-parameters", "optimizer": "madgrad"}, marks=long),
        pytest.param("neox", {"optimizer": "sm3", "use_offload": True, **STAGES}, marks=long),
    ],
    ids=str,
)
def test_norms_are_those_of_the_checkpoint(tmp_path, flags, prepared, model, change):
    norms = {"log_norms": "gradients,parameters,optimizer-state", "total_steps": 2}
    path = run(tmp_path, {**flags, "model_name": prepared[model], **norms, **change})
    shards = [file.name.removesuffix(".optimizer.safetensors") for file in sorted(path.glob("*.optimizer.safetensors"))]
    expected: dict[str, dict[str, float]] = {"parameter_norms": {}, "optimizer_state_norms": {}}
    for shard in shards:
        of_shard = {shard: list(checkpoint.read_weights(path, shard).values())}
        for entry in checkpoint.read_optimizer(path, shard).values():
            for key, tensor in entry.items():
                if key != "step":
                    of_shard.setdefault(f"{shard}_{key}", []).append(tensor)
        for name, tensors in of_shard.items():
            kind = "parameter_norms" if name == shard else "optimizer_state_norms"
            expected[kind][name] = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    for row in metrics.read(path.parent):
        assert set(row["gradient_norms"]) == set(shards)
        assert math.hypot(*row["gradient_norms"].values()) == pytest.approx(row["grad_norm"])
    assert sorted(shards) == sorted(shard_names(len(shards) - 2))
    last = metrics.read(path.parent)[-1]
    for kind, values in expected.items():
        # A head whose only matrix is the embedding's has no columns.
        found = {name: value for name, value in last[kind].items() if value or name in values}
        assert found == pytest.approx(values, rel=1e-6), kind
