"""Seams between the parts of a layer that are spread over a process group: one all-reduce each, forward or backward.

Both reduce a copy: what a seam is given, autograd or a caller may still hold. They run in the tensor's own dtype.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Enter(nn.Module):
    """From the hidden state that all parts have into one part: identity, and the sum of the gradients over parts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        entered: Tensor = _SumGradients.apply(x, self.group)  # type: ignore[no-untyped-call]
        return entered


class Leave(nn.Module):
    """From one part's result to the sum over parts, which all have: its gradient is that of each part's result."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        left: Tensor = _SumValues.apply(x, self.group)  # type: ignore[no-untyped-call]
        return left


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum(gradients[0], ctx.group), None


class _SumValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
