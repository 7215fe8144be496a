"""The optimizer of a run: which update rule, over which groups of parameters, and what of a checkpoint it can use."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from openchatkit.errors import UserError
from openchatkit.training.rank_weights import RankWeights
from openchatkit.training.update_rules import MOMENTS, SM3, AdamWithBfloat16Moments, Lion, Madgrad


def build_optimizer(
    name: str,
    weights: RankWeights,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    moments: str = "float32",
    momentum: float = 0.0,
    sm3_beta: float = 0.0,
) -> torch.optim.Optimizer:
    """Return the optimizer of a name of `--optimizer`, which updates the masters of `weights`.

    Only matrices decay. `moments` is the form of the state, as `optimization.name_moments` has it; Adam's is float32,
    bf16, or 8bit, with a scale for each block. A rule takes of the other numbers what it has.
    """
    matrices = {run: master for run, master in weights.masters.items() if weights.parameter(run).dim() > 1}
    others = {run: master for run, master in weights.masters.items() if run not in matrices}
    groups = [
        {"params": list(matrices.values()), "weight_decay": weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    if name == "lion":
        return Lion(groups, lr=lr, betas=betas)
    if name == "madgrad":
        return Madgrad(groups, lr=lr, momentum=momentum, eps=eps)
    if name == "sm3":
        return SM3(groups, lr=lr, momentum=momentum, beta=sm3_beta, eps=eps)
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    make: Callable[..., torch.optim.Optimizer]
    if moments == "8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("8-bit state needs bitsandbytes: pip install 'openchatkit[gpu]'") from error
        eight_bit = bitsandbytes.optim  # type: ignore[attr-defined]
        make = eight_bit.Adam8bit if name == "adam" else eight_bit.AdamW8bit
        return make(groups, **options)
    if moments == "bf16":
        starts = {master: run.start for run, master in weights.masters.items()}
        return AdamWithBfloat16Moments(groups, starts, decoupled=name != "adam", **options)
    make = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return make(groups, fused=True, **options)


def convert_moments(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a parameter's stored state with its moments in the dtype in which an optimizer keeps them."""
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWithBfloat16Moments) else torch.float32
    return {key: value.to(dtype) if key in MOMENTS else value for key, value in state.items()}
