"""The norms that GPT-NeoX's settings choose between, each over the last dimension of a tensor.

All compute in float32 at least and return the dtype that they are given. Their parameters have one dimension, so that
no optimizer lets them decay. Formulas: GPT-NeoX, megatron/model/norms.py; RMSNorm is of Zhang and Sennrich
(arXiv 1910.07467), ScaleNorm of Nguyen and Salazar (arXiv 1910.05895).
"""

import math

import torch
from torch import Tensor, nn


def make_norm(kind: str, width: int, eps: float, *, groups: int = 1) -> nn.Module:
    """Return the norm of a kind of `neox_options.NORMS`, over `width` numbers.

    `groups`: RMSNorm and ScaleNorm are over each of so many equal runs of these, as GPT-NeoX's of queries and keys are
    over the heads. Layernorms are over all the same, there as here.
    """
    if kind in ("rmsnorm", "rmsnorm_2021"):
        return RMSNorm(width, eps, groups=groups, eps_in_root=kind == "rmsnorm")
    if kind == "scalenorm":
        return ScaleNorm(eps, groups=groups)
    assert kind in ("layernorm", "non_parametric_layernorm"), kind
    return nn.LayerNorm(width, eps=eps, elementwise_affine=kind == "layernorm")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x scale; without `eps_in_root`, x / (sqrt(mean(x^2)) + eps) x scale."""

    def __init__(self, width: int, eps: float, *, groups: int = 1, eps_in_root: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps, self.groups, self.eps_in_root = eps, groups, eps_in_root

    def forward(self, x: Tensor) -> Tensor:
        runs = torch.unflatten(_widen(x), -1, (self.groups, -1))
        # One pass for a sum of squares, and products alone for what is as large as x.
        root = torch.linalg.vector_norm(runs, dim=-1, keepdim=True) / math.sqrt(runs.shape[-1])
        factor = (root.square() + self.eps).rsqrt() if self.eps_in_root else (root + self.eps).reciprocal()
        normed: Tensor = (runs * factor).flatten(-2) * self.scale
        return normed.to(x.dtype)


class ScaleNorm(nn.Module):
    """x / max(norm of x, eps) x g, of one number g."""

    def __init__(self, eps: float, *, groups: int = 1) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor) -> Tensor:
        runs = torch.unflatten(_widen(x), -1, (self.groups, -1))
        length = torch.linalg.vector_norm(runs, dim=-1, keepdim=True).clamp_min(self.eps)
        normed: Tensor = runs * (self.g / length)
        return normed.flatten(-2).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
