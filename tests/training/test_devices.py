"""device.py, and what only a GPU would notice, tested without one: copies in main memory, waits, library settings."""

import contextlib
import functools
import os
import subprocess
import sys
import weakref

import pytest
import ranks
import torch
from test_layouts import STAGES, assert_same_bits, run
from torch.utils._python_dispatch import TorchDispatchMode

from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import LayerShards, read_config
from openchatkit.models.stage import Stage
from openchatkit.training import checkpoints, config, device
from openchatkit.training.device import let_cuda_blocks_grow, make_deterministic
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.precision import LossScaler
from openchatkit.training.step import Schedule, Trainer, _StepSums
from openchatkit.training.weights import Weights


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


def make_weights(stage, layout, optimizer):
    weights = Weights(LocalStages({0: stage}), layout, dtype=torch.float32)
    weights.optimizer = optimizer(weights.masters.values())
    return weights


@pytest.mark.parametrize("model", ["neox", "tied"])
def test_optimizer_state_goes_to_a_device_tensor_by_tensor(tmp_path, flags, prepared, model):
    """With parameters on the meta device as if on a GPU: none of the state is copied within main memory first."""
    path = run(tmp_path, flags, model_name=prepared[model])
    with torch.device("meta"):
        stage = Stage(read_config(path)[1])
    weights = make_weights(stage, Layout(0, torch.device("meta")), torch.optim.AdamW)
    with CopiesInMainMemory() as copies:
        checkpoints.load_optimizer(weights, path)
    sizes = []
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            entry = weights.optimizer.state[parameter]
            assert entry["exp_avg"].device.type == "meta"
            assert entry["exp_avg"].shape == parameter.shape, (shard, name)
            sizes.append(entry["exp_avg"].nbytes)
    assert copies.most <= max(sizes), "the whole state is more than its largest tensor"
    assert sum(sizes) > 4 * max(sizes)


def test_loaded_optimizer_state_is_a_copy_of_the_file(tmp_path, flags):
    """The optimizer writes to its state, which must not show in what another reader of the checkpoint sees."""
    path = run(tmp_path, flags)
    stage = Stage(read_config(path)[1])
    weights = make_weights(stage, Layout(0, torch.device("cpu")), torch.optim.AdamW)
    checkpoints.load_optimizer(weights, path)
    before = {shard: checkpoint.read_optimizer(path, shard) for shard in stage.shards}
    for shard, module in stage.named_shards():
        for name, parameter in module.named_parameters():
            for key, value in weights.optimizer.state[parameter].items():
                assert torch.equal(value, before[shard][name][key])
                value.add_(1)
                assert not torch.equal(value, before[shard][name][key])
    checkpoint.verify(path)


def test_a_step_waits_for_no_value_of_the_device_between_its_two_reductions(flags, prepared, monkeypatch):
    """The meta device has no values, so that code that waits for one, such as the number of trained tokens, fails."""
    stage = Stage(LayerShards.open(prepared["neox"]).config).to("meta")
    layout = Layout(0, torch.device("meta"))
    place = {"pp_mode": "gpipe", "micro_batch_size": 2, "seq_length": 48}
    scaler = LossScaler.create(fp16=False, fixed=0, initial=1.0, minimum=1.0, window=1, hysteresis=1)
    trainer = Trainer(
        make_weights(stage, layout, torch.optim.SGD),
        scaler,
        Schedule(8, 1, LearningRates(0.1, 9), 9, 1.0),
        dtype=torch.float32,
        **place,
    )
    data = DataOptions(prepared["neox"], data_cache=flags["data_cache"], seq_length=48, packing="documents")
    dataset = build_dataset(str(flags["task_name"]), data)
    assert (dataset.batch(0, 8).labels == -100).any()
    assert (dataset.batch(0, 8).labels != -100).any()
    # Autocast does not know the meta device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(trainer, "_count", lambda batches, sources: (0, [100]))
    monkeypatch.setattr(trainer, "_sum_over_ranks", lambda *_: _StepSums(1.0, False, False, [1.0], [1.0]))
    before = [parameter._version for parameter in stage.parameters()]
    assert trainer.step(0, dataset).applied
    assert all(p._version > version for p, version in zip(stage.parameters(), before, strict=True))


def test_numbers_come_from_the_device_in_one_transfer_a_reduction(flags, prepared, monkeypatch):
    """Each of these methods of a tensor waits for a GPU: a step may call two of them, one a reduction."""
    called = []

    def count(self, method, *arguments):
        called.append(method)
        return method(self, *arguments)

    for name in ("tolist", "item", "cpu", "__int__", "__float__", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, functools.partialmethod(count, method))
    stage = Stage(LayerShards.open(prepared["neox"]).config)
    stage.init_weights(0)
    place = {"pp_mode": "gpipe", "micro_batch_size": 2, "seq_length": 48}
    scaler = LossScaler.create(fp16=False, fixed=0, initial=1.0, minimum=1.0, window=1, hysteresis=1)
    layout, schedule = Layout(0, torch.device("cpu")), Schedule(8, 1, LearningRates(0.1, 9), 9, 1.0)
    trainer = Trainer(make_weights(stage, layout, torch.optim.SGD), scaler, schedule, dtype=torch.float32, **place)
    data = DataOptions(prepared["neox"], data_cache=flags["data_cache"], seq_length=48, packing="documents")
    dataset = build_dataset(str(flags["task_name"]), data)
    called.clear()
    assert trainer.step(0, dataset).applied
    assert len(called) == 2
    called.clear()
    assert trainer.evaluate(dataset, 2).trained_tokens
    assert len(called) == 1


def test_deterministic_runs_change_no_bit_on_the_cpu_and_are_recorded(tmp_path, flags):
    flags = {**flags, "packing": "documents", "total_steps": 2}
    plain = run(tmp_path / "plain", flags)
    deterministic = run(tmp_path / "deterministic", flags, deterministic=True, **STAGES)
    assert_same_bits(plain, deterministic)
    recorded = [checkpoint.read_state(path)["settings"]["deterministic"] for path in (plain, deterministic)]
    assert recorded == [False, True]


@pytest.fixture
def default_kernels(monkeypatch):
    """Torch as it is without the flag, which the test may change."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.backends.cuda.enable_cudnn_sdp(before[1])


@pytest.mark.usefixtures("default_kernels")
def test_deterministic_asks_every_library_for_kernels_that_keep_their_order():
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_an_environment_that_asks_cublas_for_the_opposite(tmp_path, flags):
    flags = {**flags, "checkpoint_path": tmp_path / "ckpt"}
    opposite = {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    ended = ranks.train(tmp_path, {**flags, "deterministic": True}, environment=opposite)
    assert ended.statuses == [2]
    assert "error: CUBLAS_WORKSPACE_CONFIG=:0:0: --deterministic needs :4096:8 or :16:8" in ended.errors[0]
    assert ranks.train(tmp_path, flags, environment=opposite).statuses == [0]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_cuda_blocks_grow_unless_the_user_says_how(monkeypatch, name):
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(other, "")  # so that it is as before when the test is over
        monkeypatch.delenv(other)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:512")
    let_cuda_blocks_grow()
    expected = {name: "max_split_size_mb:512"} if name else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")} == expected


@pytest.mark.parametrize("use_cuda", ["true", "false"])
def test_a_rank_sets_what_torch_reads_as_it_starts_before_torch_is_there(tmp_path, use_cuda):
    program = (
        "import os, sys\n"
        "from openchatkit.training import command\n"
        "before = set(sys.modules)\n"
        "def say(settings): sys.exit(print('torch' in before, os.environ.get('PYTORCH_ALLOC_CONF')))\n"
        "command.device.choose_device = say\n"
        "command.main(sys.argv[1:])\n"
    )
    argv = ["--model-name", "m", "--task-name", "d", "--total-steps", "1", "--use-cuda", use_cuda]
    environment = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    ended = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert ended.stderr == ""
    assert ended.stdout.split() == ["False", "expandable_segments:True" if use_cuda == "true" else "None"]


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch):
    given = ["--model-name", "m", "--task-name", "d", "--total-steps", "1"]
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler on a CPU"):
        device.check_compiler(config.parse([*given, "--compile"]), torch.device("cpu"))
    device.check_compiler(config.parse([*given, "--compile"]), torch.device("cuda"))
    device.check_compiler(config.parse([*given, "--compile", "aot_eager"]), torch.device("cpu"))
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    device.check_compiler(config.parse([*given, "--compile"]), torch.device("cpu"))
