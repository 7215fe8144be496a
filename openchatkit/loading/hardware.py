"""The choice of device and precision, for training, chat, server, evaluation and encoder.

It depends on what the hardware does, not on its name: a processor computes in a precision if its products are faster in
it than in float32. Elsewhere they are emulated, which gives the same results several times slower.
"""

import functools
import os
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from openchatkit.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("auto", *DTYPES)

# Up to TINY parameters a CPU infers in float32, which is exact and fast enough. Above, most of the time goes to reading
# the weights, and 16 bits halve it where the processor computes in them. Above SMALL, any CPU keeps them in 16 bits.
TINY, SMALL = 10**8, 10**9

# A product of this size takes some milliseconds on one core and fits into its caches.
_PROBE = (128, 1024, 1024)
_PROBE_ROUNDS = 3


def choose_device(
    name: str = "auto", *, gpu: int | None = None, mps: bool = True, flag: str = "--device", advice: str = ""
) -> torch.device:
    """Return the device of that name; for "auto" a GPU of CUDA's, else (with `mps`) Apple's, else the CPU.

    `gpu` is the number of CUDA's GPU (default: that of this process's local rank). UserError for a missing device names
    `flag` and ends with `advice`.
    """
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second where torch has no CUDA
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{flag} {name}: there is no such device here ({reason}): expected auto, cpu, or a GPU of this "
                "machine, such as cuda:0"
            ) from error
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        number = int(os.environ.get("LOCAL_RANK", 0)) % count if gpu is None else gpu
        if number >= count:
            raise UserError(f"there is no GPU {number}: torch finds {count}, numbered from 0{advice and f'; {advice}'}")
        return torch.device("cuda", number)
    return torch.device("mps" if mps and torch.backends.mps.is_available() else "cpu")


def choose_dtype(
    name: str,
    device: torch.device,
    *,
    purpose: Literal["training", "inference"] = "inference",
    parameters: int | None = None,
    flag: str = "--precision",
) -> torch.dtype:
    """Return the precision of that name to compute in; "auto" looks at the device.

    That is bfloat16 where the hardware computes in it. Else it is float32 for training, and for inference float16 on
    GPUs and float32 on CPUs. For models of few `parameters` a CPU infers in float32, for very large ones in bfloat16
    on any, since memory decides. UserError where a precision that was asked for cannot be computed in at all.
    """
    if name != "auto":
        dtype = DTYPES[name]
        if (reason := _refusal(device, dtype)) is not None:
            raise UserError(f"{flag} {name}: {device} cannot compute in it ({reason}): use {flag} auto or float32")
        return dtype
    native = computes_in(device, torch.bfloat16)
    if purpose == "training":
        return torch.bfloat16 if native else torch.float32
    if device.type != "cpu":
        return torch.bfloat16 if native else torch.float16
    if parameters is None:
        return torch.bfloat16 if native else torch.float32
    return torch.float32 if parameters <= (TINY if native else SMALL) else torch.bfloat16


def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device has units for products in this precision, so that it need not emulate them."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return slowdown(dtype) <= 1
    return _refusal(device, dtype) is None


def emulation_note(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return a line on the cost of this precision where the device emulates it; None where it does not."""
    if computes_in(device, dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        return f"{device} emulates {name}, which is slower than float32: --precision auto takes what it computes in"
    return (
        f"this processor emulates {name}: a product takes {slowdown(dtype):.1f} times as long as in float32; "
        "--precision auto takes what it computes in"
    )


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """Return the time of a product in this precision on the CPU, divided by that of the same product in float32.

    It is the CPU time of one thread, so other work on the machine does not count; measuring takes some hundredths of a
    second. Units for bfloat16 gave 0.3 to 0.5, emulation 2 to 9, on the processors tried.
    """
    rows, inputs, outputs = _PROBE
    operands = {
        kind: (torch.ones(rows, inputs, dtype=kind), torch.ones(outputs, inputs, dtype=kind))
        for kind in (torch.float32, dtype)
    }
    best = dict.fromkeys(operands, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_PROBE_ROUNDS):
            for kind, (x, weight) in operands.items():
                started = time.thread_time()
                torch.nn.functional.linear(x, weight)
                best[kind] = min(best[kind], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    # A clock may be coarser than a product, which then counts as one tick.
    tick = time.get_clock_info("thread_time").resolution
    return max(best[dtype], tick) / max(best[torch.float32], tick)


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Return the floating-point operations a second of large products in a precision, the fastest of some.

    Measured for about so many seconds, on as many threads as torch has. Sizes grow until a product takes a share of
    them, since small ones are slower.
    """
    ends = time.perf_counter() + seconds
    size, best = 256, 0.0
    while True:
        left, right = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
        torch.mm(left, right)
        synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        now = time.perf_counter()
        best = max(best, 2 * size**3 / (now - started))
        if now >= ends:
            return best
        # The next size takes eight times as long, twice.
        if size < 4096 and 16 * (now - started) < ends - now:
            size *= 2


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked to."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(*([device] if device.type == "cuda" else []))


def main_memory_in_use() -> int:
    """Return the bytes of main memory that this process fills now; where the system does not say, at its peak."""
    try:
        return int(_text("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main_memory() -> int:
    """Return the bytes of main memory that there are, or that a container may fill; 0 where that is unknown."""
    try:
        fields = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines())
        whole = int(fields["MemTotal"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    try:
        return min(whole, int(_text("/sys/fs/cgroup/memory.max")))
    except (OSError, ValueError):  # none, or "max"
        return whole


def available_memory() -> int:
    """Bytes of main memory that can be filled without anything being swapped or killed; 0 where that is unknown."""
    try:
        fields = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    try:
        # A container's own limit, of which files that were read can be given back.
        group = "/sys/fs/cgroup/memory"
        pages = dict(line.split() for line in _text(f"{group}.stat").splitlines())
        limit = int(_text(f"{group}.max")) - int(_text(f"{group}.current")) + int(pages["file"])
    except (OSError, KeyError, ValueError):
        return available
    return min(available, limit)


def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the device has no product in this precision, in torch's words; None where it has one."""
    try:
        x = torch.ones(2, 2, dtype=dtype, device=device)
        torch.nn.functional.linear(x, x)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


def _text(path: str) -> str:
    return Path(path).read_text(encoding="ascii")
