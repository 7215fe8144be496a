"""How memory is given out, on the CPU and on a GPU.

On the CPU, keep what is freed, since the next step wants the same blocks again: glibc gives large blocks back to the
system as they are freed, and the kernel fills each page with zeros when it is touched again, a tenth of a CPU training
step. On a GPU, let the blocks that torch asks CUDA for grow: where their sizes are fixed, those too small for what is
wanted next lie idle.
"""

import ctypes
import os
import platform

# Any of them is the user's own choice. torch reads the first two for CUDA, whichever is there.
_CUDA_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def let_cuda_blocks_grow() -> None:
    """Ask torch for expandable segments on GPUs unless the environment says how; call it before CUDA is first used."""
    if not any(name in os.environ for name in _CUDA_SETTINGS):
        os.environ[_CUDA_SETTINGS[0]] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Tell glibc's malloc to take no block from mmap and never to shrink its heap; does nothing elsewhere."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
