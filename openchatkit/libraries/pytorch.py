"""What moves between releases of torch, or that only some of its devices can do."""

import functools

import torch
from torch import Tensor


@functools.cache
def widens_products(device: torch.device) -> bool:
    """Whether `device` can write the product of two float16 or bfloat16 matrices in float32: CUDA, since torch 2.8."""
    half = torch.zeros(8, 8, dtype=torch.float16, device=device)
    try:
        mm_in_float32(half, half)
    except (TypeError, RuntimeError):  # no such argument, or no such kernel for this device
        return False
    return True


def mm_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Return the float32 product of two matrices of half precision, where `widens_products` says that it exists."""
    return torch.mm(left, right, out_dtype=torch.float32)
