"""The order in which torch tries its kernels for causal attention: by their speed on the GPU that trains.

Torch's own order depends on its release and the kind of card. Which kernel is fastest also depends on the width of a
head and the length of rows, so it is measured. Not on CPUs, which have one kernel besides the plain formula, and not
where torch is to be deterministic: two kernels have other bits, and the clock must not decide between them.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from loguru import logger
from torch.nn.attention import SDPBackend, sdpa_kernel

from openchatkit.distributed.layout import Layout
from openchatkit.models.config import ModelConfig
from openchatkit.models.layers import causal_attention
from openchatkit.training.balance import time_fastest
from openchatkit.training.config import Settings
from openchatkit.training.precision import compute_dtype

_FUSED = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")  # those that make no [length, length] scores


@contextlib.contextmanager
def fastest_attention(settings: Settings, config: ModelConfig, layout: Layout) -> Iterator[None]:
    """Let torch try kernels in the order of their speed for a micro-batch on a GPU, by rank 0's measure."""
    if layout.device.type != "cuda" or settings.deterministic:
        yield
        return
    heads = config.num_heads // layout.tensor_size
    shape = (settings.micro_batch_size, heads, settings.seq_length, config.head_dim)
    dtype = compute_dtype(settings.precision, layout)
    seconds = layout.together(lambda: {} if layout.rank else measure_kernels(shape, layout.device, dtype))[0]
    if layout.rank == 0:
        listed = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
        logger.info("causal attention, forward and backward: {}", listed or "no fused kernel takes this model")
    with try_kernels(list(seconds)):
        yield


def measure_kernels(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the seconds of the fused kernels that are enabled and work here, forward and backward, fastest first.

    `shape` is rows, heads, length, width of a head.
    """
    inputs = [torch.ones(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]

    def run() -> None:
        torch.autograd.grad(causal_attention(*inputs).sum(), inputs)

    seconds = {}
    for name in _list_enabled(_FUSED):
        # Of a kernel that does not work, torch warns of each reason before it raises.
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(_find(name)):
            warnings.simplefilter("ignore")
            seconds[name] = time_fastest(run, device)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


@contextlib.contextmanager
def try_kernels(first: list[str]) -> Iterator[None]:
    """Let torch try these kernels first, in their order, then the others that are enabled."""
    others = [name for name in _list_enabled((*_FUSED, "MATH")) if name not in first]
    with sdpa_kernel([_find(name) for name in (*first, *others)], set_priority=True):
        yield


def _list_enabled(names: tuple[str, ...]) -> list[str]:
    cuda = torch.backends.cuda
    enabled: dict[str, Callable[[], bool]] = {
        "FLASH_ATTENTION": cuda.flash_sdp_enabled,
        "CUDNN_ATTENTION": cuda.cudnn_sdp_enabled,
        "EFFICIENT_ATTENTION": cuda.mem_efficient_sdp_enabled,
        "MATH": cuda.math_sdp_enabled,
    }
    return [name for name in names if enabled[name]()]


def _find(name: str) -> SDPBackend:
    kernel: SDPBackend = getattr(SDPBackend, name)
    return kernel
