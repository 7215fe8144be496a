"""Linear layers for inference: with weights of 8 bits, and with weights laid out as oneDNN reads them fastest.

Owns the operators of torch that are private and may move between its releases; nobody else calls them. A reply is made
one token at a time, and reading the weights is then what takes the time: 8 bits are half the bytes of bfloat16.
"""

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from openchatkit.progress import bar

# Up to this many rows the CPU's 8-bit operator is faster than widening the weights for an ordinary product.
FEW_ROWS = 16
# The operator reads whole vectors: beyond the end of a row, where rows are no multiple of them.
_VECTOR = 32
# Rows are quantised in blocks of about this many numbers, which fit into a processor's cache when widened to float32.
_BLOCK = 1 << 19
# With the largest weight at this many steps, the rounding of the step itself to 8 bits of mantissa cannot push it over
# the 127 that there are.
_STEPS = 126.5


class Int8Linear(nn.Module):
    """x @ weight.T + bias with weights of 8 bits, each output channel in steps of its own; it computes in `dtype`.

    Every weight is within half a step of the original, a step being 1/126.5 of its channel's largest weight. The layer
    is made on `device`, whatever holds the original. Symmetric and weight-only, as in gpt-fast.
    """

    def __init__(self, linear: nn.Linear, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Steps in bfloat16 are what the CPU's operator takes; float16 could not hold small ones.
        scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        weight, scale = quantise(linear.weight.detach(), device=device, scale_dtype=scale_dtype)
        bias = None if linear.bias is None else linear.bias.detach().to(device, dtype)
        self.register_buffer("weight", weight)  # [out, in]
        self.register_buffer("scale", scale)  # [out]
        self.register_buffer("bias", bias)  # [out]
        self._fits = device.type == "cpu" and dtype == torch.bfloat16 and self.in_features % _VECTOR == 0

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        rows = x.numel() // self.in_features
        if self._fits and rows <= FEW_ROWS:
            y = torch._weight_int8pack_mm(x.reshape(rows, -1).contiguous(), self.weight, self.scale)
            y = y.view(*x.shape[:-1], self.out_features)
        elif x.dtype == torch.float16:
            # The steps first: sums of products with numbers up to 127 would not fit into float16.
            y = functional.linear(x, (self.weight * self.scale[:, None]).to(x.dtype))
        else:
            y = (functional.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """nn.Linear with its weights copied into oneDNN's own layout; the same numbers up to the order of additions."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # 1 is the number of rows to lay out for; many rows are no slower for it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def quantise(weight: Tensor, *, device: torch.device, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Steps from -127 to 127, int8 [out, in], and the size of a step by output channel [out], both on `device`."""
    steps = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=scale_dtype, device=device)
    count = max(1, _BLOCK // weight.shape[1])
    # One piece of memory for all blocks: asking the system for new pages costs more than the arithmetic.
    widened = torch.empty(count, weight.shape[1], dtype=torch.float32, device=device)
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        block = widened[: len(weight[rows])].copy_(weight[rows])
        # A channel of zeros has no largest weight to divide by.
        least, most = block.amin(dim=1), block.amax(dim=1)
        largest = torch.maximum(most, -least)
        scale[rows] = (largest / _STEPS).clamp(min=torch.finfo(scale_dtype).tiny)
        steps[rows] = block.div_(scale[rows, None].float()).round_()
    return steps, scale


def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed weights of this precision are faster here: on processors that oneDNN computes it on natively."""
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear_bytes(model: nn.Module) -> int:
    """The size of the weights of all linear layers; an output layer that shares the embedding's counts too."""
    return sum(module.weight.nbytes for module in model.modules() if type(module) is nn.Linear)


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module], description: str) -> None:
    """Put what `make` makes of it in the place of every linear layer, one after the other.

    Each original goes before the next is looked at, so that two models are never in memory. An embedding that the
    output layer shares stays as it is.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    with bar(len(names), description, unit="layer", leave=False, delay=1) as progress:
        for name in names:
            model.set_submodule(name, make(model.get_submodule(name)))
            progress.update()
