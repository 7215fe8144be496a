"""Memory on the CPU: keep what is freed, since the next step wants the same blocks again.

glibc gives large blocks back to the system as they are freed, and the kernel fills each page with zeros when it is
touched again: a tenth of a CPU training step.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Tell glibc's malloc to take no block from mmap and never to shrink its heap; does nothing elsewhere."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
