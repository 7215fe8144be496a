"""Bytes that a layer keeps for its backward pass, counted on tensors without memory: of models with many options."""

import dataclasses
import functools

import torch
from torch import Tensor

from openchatkit.libraries import pytorch
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part
from openchatkit.models.family import SkipInit
from openchatkit.models.stage import Stage
from openchatkit.training.precision import autocast

_CPU = torch.device("cpu")


@functools.lru_cache
def count_kept_bytes(config: ModelConfig, *, parts: int, rows: int, length: int, dtype: torch.dtype) -> int | None:
    """Return the bytes that one more layer keeps of [rows, length] tokens on a CPU, its input included.

    What layers share, such as masks, is not counted. None where torch cannot trace a layer.
    """
    counts = [_trace(config, layers, parts, rows, length, dtype) for layers in (1, 2)]
    return None if counts[0] is None or counts[1] is None else counts[1] - counts[0]


def _trace(config: ModelConfig, layers: int, parts: int, rows: int, length: int, dtype: torch.dtype) -> int | None:
    """Return the bytes of all that so many layers keep, but for parameters; sparse ones, if any layer is."""
    without_memory = pytorch.tensors_without_memory()
    if without_memory is None:
        return None
    # The storages themselves, so that no two have one name.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    # Tensors without content make no masks. All layers share a window's, and one of blocks is as large as another.
    is_sparse = bool({*config.options.attention_config} - {"global"})
    options = dataclasses.replace(
        config.options, attention_config=("local",) * layers * is_sparse, sliding_window_width=None
    )
    short = dataclasses.replace(config, num_layers=layers, options=options)
    with without_memory, SkipInit():
        stage = Stage(short, embed=False, head=False, part=Part(0, parts))
        for parameter in stage.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.to(dtype)
        x = torch.empty(rows, length, config.hidden_size, dtype=dtype, requires_grad=True)
        keys = torch.zeros(rows, dtype=torch.int64) if options.drops_out else None
        with autocast(_CPU, dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = stage(x, dropout_keys=keys)
        parameters = {id(parameter.untyped_storage()) for parameter in stage.parameters()}
        del result  # which held what is counted
    return sum(storage.nbytes() for name, storage in kept.items() if name not in parameters)
