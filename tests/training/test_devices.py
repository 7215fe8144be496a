"""What a GPU would notice and a CPU does not, shown on the meta device: copies in main memory, and waits for values."""

import contextlib
import weakref

import pytest
import torch
from test_layouts import run
from torch.utils._python_dispatch import TorchDispatchMode

from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.distributed.layout import Layout
from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import LayerShards, read_config
from openchatkit.models.stage import Stage
from openchatkit.training import checkpoints
from openchatkit.training.precision import LossScaler
from openchatkit.training.step import Schedule, Trainer


class CopiesInMainMemory(TorchDispatchMode):
    """Counts the bytes of CPU tensors that operations make, views apart: those alive at a time, and the most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu" and not func.is_view:
            self.bytes += result.nbytes
            self.most = max(self.most, self.bytes)
            weakref.finalize(result, self.freed, result.nbytes)
        return result

    def freed(self, count: int) -> None:
        self.bytes -= count


@pytest.mark.parametrize("model", ["neox", "tied"])
def test_optimizer_state_goes_to_a_device_tensor_by_tensor(tmp_path, flags, prepared, model):
    """With parameters on the meta device as if on a GPU: none of the state is copied within main memory first."""
    path = run(tmp_path, flags, model_name=prepared[model])
    with torch.device("meta"):
        stage = Stage(read_config(path)[1])
    optimizer = torch.optim.AdamW(stage.parameters())
    with CopiesInMainMemory() as copies:
        checkpoints.load_optimizer(optimizer, stage, path)
    sizes = []
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            entry = optimizer.state[parameter]
            assert entry["exp_avg"].device.type == "meta"
            assert entry["exp_avg"].shape == parameter.shape, (shard, name)
            sizes.append(entry["exp_avg"].nbytes)
    assert copies.most <= max(sizes), "the whole state is more than its largest tensor"
    assert sum(sizes) > 4 * max(sizes)


def test_what_was_loaded_is_not_the_file(tmp_path, flags):
    """The optimizer writes to its state, which must not show in what another reader of the checkpoint sees."""
    path = run(tmp_path, flags)
    stage = Stage(read_config(path)[1])
    optimizer = torch.optim.AdamW(stage.parameters())
    checkpoints.load_optimizer(optimizer, stage, path)
    before = {shard: checkpoint.read_optimizer(path, shard) for shard in stage.shards}
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            for key, value in optimizer.state[parameter].items():
                assert torch.equal(value, before[shard][name][key])
                value.add_(1)
                assert not torch.equal(value, before[shard][name][key])
    checkpoint.verify(path)


def test_a_step_asks_the_device_for_nothing_between_its_two_reductions(flags, prepared, monkeypatch):
    """The meta device has no values: what would have to wait for a GPU's, as for the number of trained tokens, fails."""
    stage = Stage(LayerShards.open(prepared["neox"]).config).to("meta")
    layout = Layout(0, 1, 1, torch.device("meta"))
    place = {"pp_mode": "gpipe", "micro_batch_size": 2, "seq_length": 48, "reduce_through_cpu": False}
    optimizer = torch.optim.SGD(stage.parameters())
    scaler = LossScaler.create(fp16=False, fixed=0, initial=1.0, minimum=1.0, window=1, hysteresis=1)
    trainer = Trainer(stage, layout, optimizer, scaler, Schedule(8, 1, 0.1, 0, 9, 1.0), dtype=torch.float32, **place)
    data = DataOptions(prepared["neox"], cache_dir=flags["data_cache"], seq_length=48, packing="documents")
    dataset = build_dataset(str(flags["task_name"]), data)
    assert (dataset.batch(0, 8).labels == -100).any()
    assert (dataset.batch(0, 8).labels != -100).any()
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(trainer, "_count", lambda batches, sources: (0, [100]))
    monkeypatch.setattr(trainer, "_reduce", lambda loss, stop, digest: (1.0, 1.0, stop, [1.0]))
    before = [parameter._version for parameter in stage.parameters()]
    assert trainer.step(0, dataset).applied
    assert all(p._version > version for p, version in zip(stage.parameters(), before, strict=True))
