"""The device of this rank: choice, memory, determinism, profile. Some of it is set before torch is imported."""

import ctypes
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit.errors import UserError
from openchatkit.training.config import Settings

if TYPE_CHECKING:
    import torch

TRACES = Path("trace_json")

# Each of them is the user's own choice. torch reads the first two for CUDA, whichever is set.
_CUDA_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# cuBLAS reads it when it starts, with the first product; torch knows of these two that both keep its sums in order.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def choose_device(settings: Settings) -> "torch.device":
    """Return the GPU of --cuda-id, or the CPU with --use-cuda false or without CUDA."""
    import torch

    from openchatkit.loading import hardware

    device = hardware.choose_device(
        "auto" if settings.use_cuda else "cpu",
        gpu=settings.cuda_id,
        mps=False,
        advice="start fewer ranks here, or give --use-cuda false",
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def check_compiler(settings: Settings, device: "torch.device") -> None:
    """Raise UserError where --compile needs a C++ compiler, as it does on CPUs, and there is none."""
    if settings.compile != "inductor" or device.type != "cpu":
        return
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if not any(name and shutil.which(name) for name in names):
        raise UserError(
            "--compile needs a C++ compiler on a CPU, and none of g++, clang++ and c++ was found: install one, name it "
            "in CXX, or leave the flag out"
        )


def let_cuda_blocks_grow() -> None:
    """Ask torch for expandable segments on GPUs unless the environment says how; call it before CUDA is first used.

    Blocks of a fixed size that are too small for the next tensor lie idle.
    """
    if not any(name in os.environ for name in _CUDA_ALLOCATOR):
        os.environ[_CUDA_ALLOCATOR[0]] = "expandable_segments:True"


def memory_in_use(device: "torch.device") -> int:
    """Return the bytes of its memory that this rank has reserved now: of the GPU, or of main memory on a CPU."""
    import torch

    from openchatkit.loading import hardware

    return torch.cuda.memory_reserved(device) if device.type == "cuda" else hardware.main_memory_in_use()


def keep_freed_memory() -> None:
    """Tell glibc's malloc to take no block from mmap and never to shrink its heap; does nothing elsewhere.

    The next step wants the same blocks again. By default glibc gives large ones back to the system, whose kernel fills
    each page with zeros when it is touched again: a tenth of a CPU training step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


def make_deterministic() -> None:
    """Allow only kernels whose results do not vary from run to run; call it before CUDA is first used.

    torch's fastest GPU kernels add in whatever order their threads finish; the CPU's do not. UserError where the
    environment asks cuBLAS for the opposite.
    """
    import torch

    given = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if given not in _WORKSPACES:
        raise UserError(
            f"{_WORKSPACE}={given}: --deterministic needs {' or '.join(_WORKSPACES)}; unset it for the first"
        )
    torch.use_deterministic_algorithms(True)
    # By default every new tensor is then filled, in case it is read before it is written, which does not happen here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Flash and memory-efficient attention have backward passes that keep the order; cuDNN's has none.
    torch.backends.cuda.enable_cudnn_sdp(False)


def profiler(settings: Settings) -> "torch.profiler.profile":
    """Return torch's profiler, whose `step` is to be called after each step.

    It lets two steps pass and records three, with shapes and memory of all operations, in a Chrome trace a rank.
    """
    import torch

    TRACES.mkdir(exist_ok=True)
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(TRACES / trace_name(settings))),
        record_shapes=True,
        profile_memory=True,
    )


def trace_name(settings: Settings) -> str:
    """Return the name of this rank's trace in `TRACES`."""
    return f"{settings.job_id}_rank{settings.rank}_{settings.trace_postfix}.json"
