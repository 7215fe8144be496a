"""A loaded model's linear layers in 8 bits, quantised once: the next time they are mapped from the disk.

Owns what is cached; how a weight is quantised is `linear`'s, where it is cached `formats.int8_cache`'s.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from openchatkit.errors import UserError
from openchatkit.formats import int8_cache
from openchatkit.inference.engine import linear
from openchatkit.inference.engine.linear import Int8Linear
from openchatkit.loading import hardware

# Fewer weights than this are quantised faster than their cache is found.
SMALLEST = 10**6
_PARTS = ("weight", "scale")


def quantise(model: nn.Module, folder: Path | None, device: torch.device, dtype: torch.dtype) -> None:
    """Bring a model to its device with linear layers of 8 bits and all else in `dtype`.

    It comes in the precision that it is stored in, mapped, so that main memory and the GPU's hold 8 bits alone. Those
    are cached for its `folder`, if it has one.
    """
    path = _cache_path(model, folder, dtype)
    kept = int8_cache.read(path) if path else None
    if kept is not None and _fits(kept, model, linear.step_dtype(dtype)):

        def make(name: str, layer: nn.Linear) -> Int8Linear:
            weight, scale = (kept[f"{name}.{part}"].to(device) for part in _PARTS)
            bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
            return Int8Linear.of(weight, scale, bias, dtype=dtype)

        linear.replace(model, make, "loading")
    else:
        names = linear.linear_names(model)
        linear.replace(model, lambda _, layer: Int8Linear(layer, device=device, dtype=dtype), "loading")
        if path:
            layers = {name: model.get_submodule(name) for name in names}
            parts = {f"{name}.{part}": layer.get_buffer(part) for name, layer in layers.items() for part in _PARTS}
            int8_cache.write(path, parts)
    linear.convert(model, dtype, device)
    model.to(device)
    if device.type == "cpu":
        # Mapped files need no room, copies do; a fifth is left for the rest.
        linear.pack_int8(model, room=0.8 * hardware.available_memory())


def _cache_path(model: nn.Module, folder: Path | None, dtype: torch.dtype) -> Path | None:
    """Where the model's weights are kept, or None where they need not or cannot be."""
    if folder is None or linear.linear_bytes(model, torch.int8) < SMALLEST:
        return None
    try:
        return int8_cache.cache_path(folder, str(linear.step_dtype(dtype)))
    except (OSError, UserError):
        return None


def _fits(kept: Mapping[str, Tensor], model: nn.Module, step_dtype: torch.dtype) -> bool:
    """Whether tensors are those of the model's linear layers."""
    expected = {}
    for name in linear.linear_names(model):
        shape = model.get_parameter(f"{name}.weight").shape
        expected[f"{name}.weight"] = (torch.int8, shape)
        expected[f"{name}.scale"] = (step_dtype, shape[:1])
    return expected == {name: (tensor.dtype, tensor.shape) for name, tensor in kept.items()}
