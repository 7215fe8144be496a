"""Recomputing of layers in the backward pass: all that they compute, or all but attention and small products.

A layer keeps its input alone; selective recomputing also keeps what costs most to compute for what it takes to hold
(Korthikanti et al., arXiv 2205.05198, section 5): attention's result, and products that are no wider than their input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openchatkit.models.documents import Borders
from openchatkit.models.views import LayerView

_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_varlen_attn",  # of `documents`
)
_PRODUCTS = ("mm", "addmm")


def recompute(layer: Callable[..., Tensor], *inputs: Tensor | Borders | LayerView | None, selective: bool) -> Tensor:
    """Call a layer such that its backward pass computes its inner results again; the bits are those of a plain call."""
    options: dict[str, Any] = {"context_fn": _contexts} if selective else {}
    result: Tensor = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    return result


def keep_in_main_memory(hidden: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which a layer that is computed again keeps its input `hidden` in main memory until then.

    What all layers share, such as masks, stays where it is. On a GPU, copies are in the order of its work, and nothing
    waits for them. (torch's own `save_on_cpu` does.)
    """

    place = hidden.data_ptr()  # `pack` lives as long as what it has packed, and is not to hold the input itself

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.data_ptr() != place:
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, host = packed
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_choose)  # type: ignore[no-untyped-call]


def _choose(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Return whether an operator's result is kept."""
    name = operator.overloadpacket.__name__ if isinstance(operator, torch._ops.OpOverload) else ""
    kept = name in _ATTENTION
    if name in _PRODUCTS:
        # The last two arguments are the factors: [tokens, width] and [width, result's width].
        rows_of_factor, width = arguments[-1].shape
        kept = width <= rows_of_factor
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
