"""The update rules that torch and bitsandbytes do not have: Adam with bfloat16 moments, Lion, MADGRAD and SM3.

All but SM3 update each element by itself, so that a run of a parameter's elements is updated as it would be in the
whole. They go through a tensor chunk by chunk, whose intermediate results stay in a processor's caches.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's
_CHUNK = 1 << 16  # elements on a CPU, whose caches hold all that a step makes of them
_CHUNK_OF_GPU = 1 << 24

Groups = Sequence[dict[str, Any]]


class UpdateRule(torch.optim.Optimizer, abc.ABC):
    """An optimizer whose step updates one tensor after another; gradients are float32."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient."""
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, tensor.grad, group)

    @abc.abstractmethod
    def _update(self, tensor: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a tensor and its entry of `state`."""


class ElementwiseRule(UpdateRule):
    """An update rule that an element's own gradients and state are enough for."""

    def _update(self, tensor: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[tensor]
        if not state:
            state |= {"step": torch.zeros((), dtype=torch.float32), **self._start(tensor.detach(), group)}
        state["step"] = state["step"].cpu() + 1  # a checkpoint's comes on the weights' device
        of_elements = [value for key, value in state.items() if key != "step"]
        flats = [each.view(-1) for each in (tensor.detach(), gradient, *of_elements)]
        size = _CHUNK_OF_GPU if tensor.device.type == "cuda" else _CHUNK
        place, names = self._find_start(tensor), [key for key in state if key != "step"]
        for weight, slope, *values in zip(*(torch.split(flat, size) for flat in flats), strict=True):
            self._update_chunk(weight, slope, dict(zip(names, values, strict=True)), group, int(state["step"]), place)
            place += len(weight)

    def _find_start(self, tensor: Tensor) -> int:
        """Return at which element of its parameter a tensor begins, for a rule that asks for places."""
        return 0

    @abc.abstractmethod
    def _start(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a tensor before its first step: tensors of its shape by key."""

    @abc.abstractmethod
    def _update_chunk(
        self, weight: Tensor, slope: Tensor, state: Mapping[str, Tensor], group: dict[str, Any], step: int, place: int
    ) -> None:
        """Update consecutive elements, the first of which is number `place` of its parameter, at a step from 1 on."""


class AdamWithBfloat16Moments(ElementwiseRule):
    """Adam (Kingma and Ba, arXiv 1412.6980) whose moments are bfloat16, rounded up or down at random.

    bfloat16 has eight bits: the nearest value to a second moment that moves by a thousandth is the old one, so that it
    would stay for ever. Rounded up with the probability that leaves the mean right, it follows. The randomness is a
    function of the step and of the element's place in its parameter, so that it is the same however state is shared.

    `starts` says for each tensor to update at which element of its parameter it begins.
    `decoupled`: weight decay acts on the weights alone (Loshchilov and Hutter, arXiv 1711.05101).
    """

    def __init__(
        self,
        groups: Groups,
        starts: Mapping[Tensor, int],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._starts, self._decoupled = starts, decoupled

    def _find_start(self, tensor: Tensor) -> int:
        return self._starts[tensor]

    def _start(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {key: _make_zeros(weight, torch.bfloat16) for key in MOMENTS}

    def _update_chunk(
        self, weight: Tensor, slope: Tensor, state: Mapping[str, Tensor], group: dict[str, Any], step: int, place: int
    ) -> None:
        decay, (beta1, beta2) = group["weight_decay"], group["betas"]
        rate, root = group["lr"] / (1 - beta1**step), math.sqrt(1 - beta2**step)
        first, second = (state[key] for key in MOMENTS)
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


class Lion(ElementwiseRule):
    """Lion (Chen et al., arXiv 2302.06675): steps by the sign of a mean of gradients; weight decay is decoupled."""

    def __init__(self, groups: Groups, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    def _start(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": _make_zeros(weight)}

    def _update_chunk(
        self, weight: Tensor, slope: Tensor, state: Mapping[str, Tensor], group: dict[str, Any], step: int, place: int
    ) -> None:
        mean, (beta1, beta2) = state["exp_avg"], group["betas"]
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(mean.mul(beta1).add_(slope, alpha=1 - beta1).sign_(), alpha=-group["lr"])
        mean.mul_(beta2).add_(slope, alpha=1 - beta2)


class Madgrad(ElementwiseRule):
    """MADGRAD (Defazio and Jelassi, arXiv 2101.11075) with decoupled weight decay, as GPT-NeoX's `madgrad_wd`.

    `momentum` is the share of its old value that a weight keeps; with 0 the first weights are not stored, but computed
    of what is there.
    """

    def __init__(self, groups: Groups, *, lr: float, momentum: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eps": eps})

    def _start(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        sums = {key: _make_zeros(weight) for key in ("grad_sum", "grad_sum_sq")}
        return sums | ({"x0": weight.clone(memory_format=torch.contiguous_format)} if group["momentum"] else {})

    def _update_chunk(
        self, weight: Tensor, slope: Tensor, state: Mapping[str, Tensor], group: dict[str, Any], step: int, place: int
    ) -> None:
        total, squares = state["grad_sum"], state["grad_sum_sq"]
        lr = group["lr"] + group["eps"]
        rate = lr * math.sqrt(step)
        weight.mul_(1 - lr * group["weight_decay"])
        first = state["x0"] if group["momentum"] else weight + total / _find_root(squares, group["eps"])
        total.add_(slope, alpha=rate)
        squares.addcmul_(slope, slope, value=rate)
        goal = first - total / _find_root(squares, group["eps"])
        weight.mul_(group["momentum"]).add_(goal, alpha=1 - group["momentum"])


class SM3(UpdateRule):
    """SM3 (Anil et al., arXiv 1901.11150): Adagrad whose sums are kept by row and by column alone. No weight decay.

    A vector has one accumulator of its own length. With `beta` above 0 sums become means that forget, as in Adam.
    """

    def __init__(self, groups: Groups, *, lr: float, momentum: float, beta: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps})

    def _update(self, tensor: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, beta, weight = self.state[tensor], group["beta"], tensor.detach()
        keys = [f"accumulator_{axis}" for axis in range(weight.dim())]
        if not state:
            state |= {key: weight.new_zeros(size) for key, size in zip(keys, weight.shape, strict=True)}
            if group["momentum"]:
                state["momentum_buffer"] = _make_zeros(weight)
        old = [_align(state[key], axis, weight.dim()) for axis, key in enumerate(keys)]
        # A mean may not fall below what it was.
        new = [each.clone() if beta else torch.zeros_like(each) for each in old]
        rows = max(1, (_CHUNK_OF_GPU if weight.device.type == "cuda" else _CHUNK) // max(weight[0].numel(), 1))
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            slope = gradient[part]
            bound = old[0][part]
            for each in old[1:]:
                bound = torch.minimum(bound, each)
            sums = bound * (beta or 1) + slope.square() * (1 - beta)
            for axis, each in enumerate(new):
                others = [other for other in range(weight.dim()) if other != axis]
                target = each if axis else each[part]
                torch.maximum(target, sums.amax(others, keepdim=True) if others else sums, out=target)
            update = sums.add_(group["eps"]).rsqrt_().mul_(slope)
            if group["momentum"]:
                update = (
                    state["momentum_buffer"][part].mul_(group["momentum"]).add_(update, alpha=1 - group["momentum"])
                )
            weight[part].sub_(update, alpha=group["lr"])
        for key, each in zip(keys, new, strict=True):
            state[key] = each.view(-1)


def _align(accumulator: Tensor, axis: int, dimensions: int) -> Tensor:
    """Return an axis' accumulator with a dimension of 1 for each other axis."""
    return accumulator.view([-1 if each == axis else 1 for each in range(dimensions)])


def _find_root(squares: Tensor, eps: float) -> Tensor:
    """Return MADGRAD's divisor: the cube root plus `eps`.

    In float64: a float32 power has other bits at the end of a chunk, where processors compute one element at a time.
    """
    return squares.double().pow_(1 / 3).to(squares.dtype).add_(eps)


def _make_zeros(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


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
