"""Times on either device, and the rates that figures are shares of."""

import statistics
import time
from collections.abc import Callable

import torch

from _gpu_check.rows import Context

# Dense bfloat16 rates that NVIDIA publishes, in FLOP/s, by what the name of the card contains.
PUBLISHED = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}


def synchronise(device: torch.device) -> None:
    """Wait for all work of a GPU; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(device: torch.device, action: Callable[[], object], *, repeat: int = 5, warm: int = 2) -> list[float]:
    """Seconds of each of `repeat` runs after `warm` that do not count, each waited for."""
    times = []
    for number in range(warm + repeat):
        synchronise(device)
        started = time.perf_counter()
        action()
        synchronise(device)
        if number >= warm:
            times.append(time.perf_counter() - started)
    return times


def median_seconds(device: torch.device, action: Callable[[], object], *, repeat: int = 5, warm: int = 2) -> float:
    """The median of `seconds_each`."""
    return statistics.median(seconds_each(device, action, repeat=repeat, warm=warm))


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a bfloat16 product of two random square matrices; the best of several."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    out = torch.empty_like(a)
    times = seconds_each(device, lambda: torch.mm(a, b, out=out), repeat=10, warm=3)
    return 2 * size**3 / min(times)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second that a copy within the device's memory reads and writes; the best of several."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds_each(device, lambda: target.copy_(source), repeat=7))


def transfer_rate(device: torch.device, size: int, *, pinned: bool) -> float:
    """Bytes a second from the GPU's memory to the host's; the best of several."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    return size / min(seconds_each(device, lambda: target.copy_(source, non_blocking=pinned), repeat=5))


def rates(context: Context, device: torch.device) -> tuple[float, float]:
    """The matrix rate in FLOP/s and the copy rate in bytes/s: what the machine part found, or measured now."""
    found = context.found("machine", "rates")
    if found:
        return found["TFLOP/s bfloat16"] * 1e12, found["GB/s copied"] * 1e9
    return matrix_rate(device, context.pick(512, 8192)), copy_rate(device, context.pick(1 << 22, 1 << 32))


def published_rate(device: torch.device) -> float | None:
    """The published rate of this card; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PUBLISHED.items() if part in name), None)
