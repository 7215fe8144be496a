"""The optimizers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.training.rank_weights import RankWeights

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's
_CHUNK = 1 << 16  # elements on a CPU, whose caches hold all that a step makes of them
_CHUNK_OF_GPU = 1 << 24


def build_optimizer(
    name: str,
    weights: RankWeights,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    moments: str = "float32",
) -> torch.optim.Optimizer:
    """Return Adam (weight decay in the gradient) or AdamW (decoupled), which updates the masters of `weights`.

    Only matrices decay. `moments` says what these are kept in: float32, bf16, or 8bit, with a scale for each block.
    """
    matrices = {run: master for run, master in weights.masters.items() if weights.parameter(run).dim() > 1}
    others = {run: master for run, master in weights.masters.items() if run not in matrices}
    groups = [
        {"params": list(matrices.values()), "weight_decay": weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    make: Callable[..., torch.optim.Optimizer]
    if moments == "8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("8-bit state needs bitsandbytes: pip install 'openchatkit[gpu]'") from error
        eight_bit = bitsandbytes.optim  # type: ignore[attr-defined]
        make = eight_bit.AdamW8bit if name == "adamw" else eight_bit.Adam8bit
        return make(groups, **options)
    if moments == "bf16":
        starts = {master: run.start for run, master in weights.masters.items()}
        return AdamWithBfloat16Moments(groups, starts, decoupled=name == "adamw", **options)
    make = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return make(groups, fused=True, **options)


def convert_moments(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a parameter's stored state with its moments in the dtype in which an optimizer keeps them."""
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWithBfloat16Moments) else torch.float32
    return {key: value.to(dtype) if key in _MOMENTS else value for key, value in state.items()}


class AdamWithBfloat16Moments(torch.optim.Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980) whose moments are bfloat16, rounded up or down at random.

    bfloat16 has eight bits: the nearest value to a second moment that moves by a thousandth is the old one, so that it
    would stay for ever. Rounded up with the probability that leaves the mean right, it follows. The randomness is a
    function of the step and of the element's place in its parameter, so that it is the same however state is shared.

    `starts` says for each tensor to update at which element of its parameter it begins; gradients are float32.
    `decoupled`: weight decay acts on the weights alone (Loshchilov and Hutter, arXiv 1711.05101).
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        starts: Mapping[Tensor, int],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._starts, self._decoupled = starts, decoupled

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient."""
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, tensor.grad, group)

    def _update(self, tensor: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in _MOMENTS:
                state[key] = torch.zeros_like(tensor, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
        state["step"] = state["step"].cpu() + 1  # a checkpoint's comes on the weights' device
        step = int(state["step"])
        decay, (beta1, beta2) = group["weight_decay"], group["betas"]
        rate, root = group["lr"] / (1 - beta1**step), math.sqrt(1 - beta2**step)
        flats = [each.view(-1) for each in (tensor.detach(), gradient, state["exp_avg"], state["exp_avg_sq"])]
        place, size = self._starts[tensor], _CHUNK_OF_GPU if tensor.device.type == "cuda" else _CHUNK
        for weight, slope, first, second in zip(*(torch.split(flat, size) for flat in flats), strict=True):
            if decay and self._decoupled:
                weight.mul_(1 - group["lr"] * decay)
            elif decay:
                slope = slope.add(weight, alpha=decay)
            mean = first.float().lerp_(slope, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            noise = _hash(len(weight), place, step, weight.device)
            _round_at_random(mean, noise & 0xFFFF, out=first)
            _round_at_random(square, (noise >> 16).bitwise_and_(0xFFFF), out=second)
            weight.addcdiv_(mean, square.sqrt_().div_(root).add_(group["eps"]), value=-rate)
            place += len(weight)


def _hash(count: int, start: int, step: int, device: torch.device) -> Tensor:
    """Return 32 random bits for each of the elements from `start` on, int32 [count]: the finalizer of MurmurHash3."""
    bits = torch.arange(count, dtype=torch.int32, device=device)
    bits += _as_int32(start + step * 0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # >> of a signed number repeats its sign
        bits *= _as_int32(factor)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def _as_int32(number: int) -> int:
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _round_at_random(values: Tensor, noise: Tensor, *, out: Tensor) -> None:
    """Write float32 values as bfloat16: up by the probability of what is cut off. `noise` is uniform in [0, 65536)."""
    out.copy_((values.view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32))
