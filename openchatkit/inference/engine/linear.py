"""Linear layers for inference: with weights of 8 bits, and with weights in the form that this processor reads fastest.

Owns the choice; the operators of torch are `libraries.pytorch`'s. A reply is generated one token at a time, and reading
the weights then takes most of the time: 8 bits are half the bytes of bfloat16. A prompt is read many tokens at once,
and arithmetic then takes most of it: in 16 bits that is slow where the processor has no instructions for them, so there
weights are widened to float32, a block at a time.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from openchatkit.libraries import pytorch
from openchatkit.loading import hardware
from openchatkit.progress import bar

# Up to this many rows torch's plain 8-bit operator is faster than widening the weights for an ordinary product.
FEW_ROWS = 16
# Up to this many rows, weights of 16 bits are faster read again for each than widened.
_FEW_NARROW_ROWS = 4
# Rows are quantised and widened in blocks of about this many numbers, which fit into a processor's cache as float32.
_BLOCK = 1 << 19
# With the largest weight at this many steps, the rounding of the step itself to 8 bits of mantissa cannot push it over
# the 127 that there are.
_STEPS = 126.5
_READ = re.compile(r"\bself\.((?:\w+\.)*\w+)\.weight\b")


class Int8Linear(nn.Module):
    """x @ weight.T + bias with weights of 8 bits, each output channel in steps of its own; it computes in `dtype`.

    Every weight is within half a step of the original, a step being 1/126.5 of its channel's largest weight. The layer
    is made on `device`, whatever holds the original. Symmetric and weight-only, as in gpt-fast. On a CPU it can be
    packed: it then has no `weight` any more.
    """

    weight: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight.detach(), device=device, scale_dtype=step_dtype(dtype))
        self._hold(weight, scale, None if linear.bias is None else linear.bias.detach().to(device, dtype), dtype)

    def _hold(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)  # [out, in]
        self.register_buffer("scale", scale)  # [out]
        self.register_buffer("bias", bias)  # [out]
        device = weight.device
        self._on_cpu = device.type == "cpu" and dtype == torch.bfloat16
        self._widens = self._on_cpu and not hardware.computes_in(device, dtype)
        # What keeps x as exact as `dtype` is, so that the weights alone have 8 bits.
        self._digits = 4 if dtype == torch.float32 else 2
        self._packed: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> "Int8Linear":
        """The layer of weights that were quantised before, on their device."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(weight, scale, bias, dtype)
        return made

    def pack(self) -> None:
        """Let the CPU read the weights in the form that it multiplies fastest, in a copy that takes their place."""
        if self.weight is not None and self.weight.device.type == "cpu":
            self._packed = pytorch.pack_int8(self.weight, self.scale, digits=self._digits)
            self.weight = self.weight if self._packed is None else None

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if self._packed is not None:
            y = self._packed(x.reshape(-1, self.in_features).float()).view(*x.shape[:-1], self.out_features)
            return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
        assert self.weight is not None, "not packed"
        if self._on_cpu and x.numel() <= FEW_ROWS * self.in_features:
            y = pytorch.multiply_int8(x.reshape(-1, self.in_features), self.weight, self.scale)
            y = y.view(*x.shape[:-1], self.out_features)
        elif self._widens:
            y = (_multiply_widened(x, self.weight).mul_(self.scale)).to(x.dtype)
        elif x.dtype == torch.float16:
            # The steps first: sums of products with numbers up to 127 would not fit into float16.
            y = functional.linear(x, (self.weight * self.scale[:, None]).to(x.dtype))
        else:
            y = (functional.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """nn.Linear in `dtype` with its weights copied into oneDNN's own layout; equal up to the order of additions."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))
        self._multiply = pytorch.pack(linear.weight.detach().to(dtype), self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return self._multiply(x)


class NarrowLinear(nn.Module):
    """nn.Linear with weights of 16 bits, for processors without instructions for them; sums are formed in float32.

    The weights stay where they are if they are of `dtype`: in a mapped file, or shared.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach().to(dtype))  # [out, in]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if x.numel() > _FEW_NARROW_ROWS * self.in_features:
            y = _multiply_widened(x, self.weight)
            return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
        # torch has a fast product of a matrix and a vector of 16 bits, which adds in float32.
        rows = [torch.mv(self.weight, row) for row in x.reshape(-1, self.in_features)]
        y = (rows[0] if len(rows) == 1 else torch.stack(rows)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y.add_(self.bias)


@torch.no_grad()
def _multiply_widened(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight.T, computed in float32: float32 [..., out]; the weight is widened a block at a time."""
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.empty(len(rows), len(weight), dtype=torch.float32)
    for block, widened in _widen(weight):
        torch.mm(rows, widened.T, out=y[:, block])
    return y.view(*x.shape[:-1], len(weight))


def _widen(weight: Tensor, device: torch.device | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight [out, in] and those rows in float32 on `device`, which are good until the next are asked for."""
    count = max(1, _BLOCK // weight.shape[1])
    # One piece of memory for all blocks: asking the system for new pages costs more than the arithmetic.
    widened = torch.empty(min(count, len(weight)), weight.shape[1], dtype=torch.float32, device=device)
    for start in range(0, len(weight), count):
        rows = slice(start, min(start + count, len(weight)))
        yield rows, widened[: rows.stop - start].copy_(weight[rows])


def prepare(model: nn.Module, dtype: torch.dtype, *, room: float) -> None:
    """Let a model on the CPU compute in `dtype`, with linear layers in the form that is fastest here.

    Packing copies the weights; where that takes more than `room` bytes they stay, if they are of `dtype`, in the files
    that they are mapped from. So a model larger than memory still runs, if slowly.
    """
    computes = hardware.computes_in(torch.device("cpu"), dtype)
    if computes and pytorch.can_pack(dtype) and linear_bytes(model, dtype) < room:
        replace(model, lambda _, layer: PackedLinear(layer, dtype), "loading")
    elif dtype.itemsize == 2 and not computes:
        replace(model, lambda _, layer: NarrowLinear(layer, dtype), "loading")
    convert(model, dtype)


def pack_int8(model: nn.Module, *, room: float) -> None:
    """Pack layers of 8 bits that are on the CPU, if the copies take no more than `room` bytes."""
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    size = sum(layer.out_features * layer.in_features for layer in layers)
    if size >= room or not pytorch.can_pack_int8():
        return
    with (
        bar(len(layers), "packing", unit="layer", leave=False, delay=1) as progress,
        pytorch.packing_int8(),
        # The operator packs on one thread.
        ThreadPoolExecutor(torch.get_num_threads()) as threads,
    ):
        for _ in threads.map(Int8Linear.pack, layers):
            progress.update()


def convert(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Convert the remaining parameters to a precision; buffers, such as those of angles, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)


def step_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of a step, for layers that compute in `dtype`.

    Steps in bfloat16 are what the CPU's operator takes; float16 could not hold small ones.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def quantise(weight: Tensor, *, device: torch.device, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Steps from -127 to 127, int8 [out, in], and the size of a step by output channel [out], both on `device`."""
    steps = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=scale_dtype, device=device)
    for rows, block in _widen(weight, device):
        # A channel of zeros has no largest weight to divide by.
        least, most = block.amin(dim=1), block.amax(dim=1)
        largest = torch.maximum(most, -least)
        scale[rows] = (largest / _STEPS).clamp(min=torch.finfo(scale_dtype).tiny)
        steps[rows] = block.div_(scale[rows, None].float()).round_()
    return steps, scale


def linear_names(model: nn.Module) -> list[str]:
    """The names of all linear layers that can be replaced, in the order of the model.

    Those whose weight other modules read, as Jamba's do, cannot.
    """
    modules = dict(model.named_modules())
    read = {
        f"{name}.{path}".removeprefix(".")
        for name, module in modules.items()
        for path in _weights_read(type(module))  # type: ignore[arg-type]  # a class is hashable
    }
    return [name for name, module in modules.items() if type(module) is nn.Linear and name not in read]


@functools.cache
def _weights_read(kind: type) -> frozenset[str]:
    """Return the paths of the parts whose weight the code of a class reads: "proj" for `self.proj.weight`."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            with contextlib.suppress(OSError, TypeError):  # without a source, as in a notebook
                found.update(_READ.findall(inspect.getsource(base)))
    return frozenset(found)


def linear_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The size in `dtype` of the weights of these layers, one that shares the embedding's included."""
    return sum(model.get_parameter(f"{name}.weight").numel() for name in linear_names(model)) * dtype.itemsize


def replace(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module], description: str) -> None:
    """Replace each linear layer by `make` of its name and itself, one after the other.

    Each original is freed before the next is replaced, so that two models are never in memory. An embedding that the
    output layer shares stays as it is.
    """
    names = linear_names(model)
    with bar(len(names), description, unit="layer", leave=False, delay=1) as progress:
        for name in names:
            model.set_submodule(name, make(name, cast(nn.Linear, model.get_submodule(name))))
            progress.update()
