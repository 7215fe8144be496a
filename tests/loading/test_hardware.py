"""The choice of device and precision (loading/hardware.py): by what the hardware computes in, measured on CPUs."""

import subprocess
import sys
import time

import pytest
import torch

from openchatkit.errors import UserError
from openchatkit.loading import hardware

CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def native(monkeypatch):
    """Decide whether the CPU computes in 16 bits: `native(True)`."""
    return lambda value: monkeypatch.setattr(hardware, "slowdown", lambda dtype: 0.4 if value else 9.0)


@pytest.mark.parametrize(
    ("units", "purpose", "parameters", "expected"),
    [
        (True, "training", None, torch.bfloat16),
        (False, "training", None, torch.float32),
        (True, "inference", None, torch.bfloat16),
        (False, "inference", None, torch.float32),
        (True, "inference", hardware.TINY, torch.float32),
        (True, "inference", hardware.TINY + 1, torch.bfloat16),
        (False, "inference", hardware.SMALL, torch.float32),
        (False, "inference", hardware.SMALL + 1, torch.bfloat16),
    ],
)
def test_a_cpu_infers_and_trains_in_the_precision_it_has_units_for(native, units, purpose, parameters, expected):
    native(units)
    assert hardware.choose_dtype("auto", CPU, purpose=purpose, parameters=parameters) == expected


@pytest.mark.parametrize(
    ("units", "purpose", "expected"),
    [
        (True, "training", torch.bfloat16),
        (False, "training", torch.float32),
        (True, "inference", torch.bfloat16),
        (False, "inference", torch.float16),
    ],
)
def test_a_gpu_is_asked_for_the_precision_it_has_units_for(monkeypatch, units, purpose, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: units)
    assert hardware.choose_dtype("auto", GPU, purpose=purpose) == expected
    assert hardware.computes_in(GPU, torch.float16)
    assert (hardware.emulation_note(GPU, torch.bfloat16) is None) == units


def test_a_product_is_tried_on_apples_gpus(monkeypatch):
    for refusal, expected in ((None, torch.bfloat16), ("BFloat16 is not supported on MPS", torch.float16)):
        monkeypatch.setattr(hardware, "_refusal", lambda device, dtype, refusal=refusal: refusal)
        assert hardware.choose_dtype("auto", MPS) == expected


def test_a_named_precision_is_taken_and_its_cost_is_noted(native):
    native(False)
    for name, dtype in hardware.DTYPES.items():
        assert hardware.choose_dtype(name, CPU, purpose="training") == dtype
    assert hardware.emulation_note(CPU, torch.bfloat16) == (
        "this processor emulates bfloat16: a product takes 9.0 times as long as in float32; --precision auto takes "
        "what it computes in"
    )
    native(True)
    assert hardware.emulation_note(CPU, torch.bfloat16) is None
    assert hardware.emulation_note(CPU, torch.float32) is None


def test_a_named_precision_without_a_product_on_the_device_is_refused(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch.nn.functional, "linear", fails)
    with pytest.raises(UserError) as raised:
        hardware.choose_dtype("float16", CPU)
    assert str(raised.value) == (
        "--precision float16: cpu cannot compute in it (\"addmm_impl_cpu_\" not implemented for 'Half'): use "
        "--precision auto or float32"
    )


def test_the_measurement_compares_times_of_products(monkeypatch):
    """A replaced clock advances by the time set for each product."""
    now = 0.0
    takes = {torch.float32: 0.002, torch.bfloat16: 0.009}

    def product(x, weight):
        nonlocal now
        now += takes[x.dtype]

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr(time, "thread_time", lambda: now)
    hardware.slowdown.cache_clear()
    try:
        threads = torch.get_num_threads()
        assert hardware.slowdown(torch.bfloat16) == pytest.approx(4.5)
        assert torch.get_num_threads() == threads
        assert hardware.slowdown.cache_info().misses == 1
        takes[torch.bfloat16] = 1.0
        assert hardware.slowdown(torch.bfloat16) == pytest.approx(4.5)
    finally:
        hardware.slowdown.cache_clear()


def test_the_measurement_runs_on_this_processor():
    code = "import torch; from openchatkit.loading import hardware; print(hardware.slowdown(torch.bfloat16))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) > 0


def test_the_choice_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert hardware.choose_device() == MPS
    assert hardware.choose_device(mps=False, gpu=7) == CPU
    assert hardware.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.choose_device(gpu=1) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert hardware.choose_device() == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"^there is no GPU 2: torch finds 2, numbered from 0; start fewer ranks$"):
        hardware.choose_device(gpu=2, advice="start fewer ranks")


@pytest.mark.parametrize("name", ["toaster", "cuda:99"])
def test_a_missing_device_is_refused(name):
    with pytest.raises(UserError, match=f"^--device {name}: there is no such device here .*: expected auto, cpu, or a"):
        hardware.choose_device(name)


def test_the_memory_that_is_left_is_what_the_system_or_the_container_says(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
    group = "/sys/fs/cgroup/memory"

    def read(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    monkeypatch.setattr(hardware, "_text", read)
    assert hardware.available_memory() == 8000 << 10
    files |= {f"{group}.max": "max\n", f"{group}.current": "5000\n", f"{group}.stat": "anon 1\nfile 3000\n"}
    assert hardware.available_memory() == 8000 << 10
    files[f"{group}.max"] = "6000\n"
    assert hardware.available_memory() == 4000
    del files["/proc/meminfo"]
    assert hardware.available_memory() == 0
