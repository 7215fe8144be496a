"""Seams between the parts of a layer that are spread over a process group: one sum each, forward or backward.

Hidden states between layers are whole on every part, or each part has a run of the tokens (sequence parallelism:
Korthikanti et al., arXiv 2205.05198, section 4.2): then a sum leaves each part its run, and a gather brings them
together again, which both send the bytes of the sum that they stand for.

All sum a copy: what a seam is given, autograd or a caller may still hold. They run in the tensor's own dtype.
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


class Gather(nn.Module):
    """From a run of the tokens into one part: all tokens, [batch, tokens, ...], and the run of the gradients' sum."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        gathered: Tensor = _GatherTokens.apply(x, self.group)  # type: ignore[no-untyped-call]
        return gathered


class Scatter(nn.Module):
    """From one part's result to this part's run of the tokens of the sum over parts; the inverse of `Gather`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        scattered: Tensor = _ScatterTokens.apply(x, self.group)  # type: ignore[no-untyped-call]
        return scattered


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scatter(gradients[0], ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gather(gradients[0], ctx.group), None


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


def _gather(run: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all parts' runs of tokens, dimension 1, in their order."""
    count = dist.get_world_size(group)
    runs = run.new_empty(count * run.shape[0], *run.shape[1:])
    dist.all_gather_into_tensor(runs, run.contiguous(), group=group)
    return torch.unflatten(runs, 0, (count, -1)).transpose(0, 1).flatten(1, 2)


def _scatter(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this part's run of the tokens, dimension 1, of the sum over parts."""
    count = dist.get_world_size(group)
    runs = torch.unflatten(tensor, 1, (count, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    total = runs.new_empty(tensor.shape[0], *runs.shape[1:])
    dist.reduce_scatter_tensor(total, runs, group=group)
    return total
