"""The card, the versions, and the rates that the other parts' figures are shares of."""

import importlib.metadata
import os
import platform
import subprocess

import torch

from _gpu_check import timing
from _gpu_check.rows import Context, Result

PACKAGES = ("transformers", "huggingface_hub", "triton", "bitsandbytes", "safetensors", "tokenizers", "numpy")


def run(context: Context) -> None:
    """Report the machine."""
    device = torch.device(context.device)

    def about(result: Result) -> None:
        result.values["python"] = platform.python_version()
        result.values["torch"] = torch.__version__
        for name in PACKAGES:
            try:
                result.values[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                result.values[name] = "missing"
        result.values["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def card(result: Result) -> None:
        properties = torch.cuda.get_device_properties(device)
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        result.values["card"] = properties.name
        result.values["GiB"] = properties.total_memory / 2**30
        result.values["GiB free"] = torch.cuda.mem_get_info()[0] / 2**30
        result.values["multiprocessors"] = properties.multi_processor_count
        result.values["driver, clock, power"] = asked.stdout.strip().splitlines()[0] if asked.stdout else "unknown"
        result.values["CUDA"] = str(torch.version.cuda)
        result.values["cuDNN"] = str(torch.backends.cudnn.version())

    def rates(result: Result) -> None:
        result.values["TFLOP/s bfloat16"] = timing.matrix_rate(device, context.pick(512, 8192)) / 1e12
        result.values["GB/s copied"] = timing.copy_rate(device, context.pick(1 << 22, 1 << 32)) / 1e9
        published = timing.published_rate(device)
        if published:
            result.values["of the published rate"] = result.values["TFLOP/s bfloat16"] * 1e12 / published

    def to_host(result: Result) -> None:
        for name, pinned in (("pageable", False), ("pinned", True)):
            result.values[f"GB/s {name}"] = timing.transfer_rate(device, 1 << 30, pinned=pinned) / 1e9

    context.check("versions", about)
    context.check("card", card, needs_cuda=True)
    context.check("rates", rates)
    context.check("copies to the host", to_host, needs_cuda=True)
