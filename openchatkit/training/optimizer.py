"""The optimizer, and its learning rate as a pure function of the step."""

from collections.abc import Callable

import torch

from openchatkit.errors import UserError
from openchatkit.training.weights import Weights


def build_optimizer(
    name: str, weights: Weights, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return Adam (weight decay in the gradient), AdamW (decoupled) or AdamW with 8-bit state; only matrices decay."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for run, master in weights.masters.items():
        (matrices if weights.parameter(run).dim() > 1 else others).append(master)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    options = {"lr": lr, "betas": betas, "eps": eps}
    if name == "8bit-adam":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("--optimizer 8bit-adam needs bitsandbytes: pip install 'openchatkit[gpu]'") from error
        make: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]
        return make(groups, **options)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[name](groups, fused=True, **options)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the rate of step `step`, counted from 0: a linear rise up to `peak`, then a linear fall to nearly 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)
