"""The placement and precision of a model's weights: devices, shares of memory, bitsandbytes.

Owns the choice, and refuses combinations that cannot work; `loader` carries it out.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from openchatkit.errors import UserError
from openchatkit.loading import hardware

GIB = 1 << 30


def choose_device(gpu_id: int, gpu_gib: Mapping[int, float] | None) -> torch.device:
    """CUDA's `gpu_id`, else Apple's MPS, else the CPU; UserError for GPUs that are not there."""
    device = hardware.choose_device(gpu=gpu_id)
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpu_gib is not None and not count:
        raise UserError("-g names GPUs, and torch finds none here: leave it out, -r limits main memory alone")
    if gpu_gib is not None and gpu_id not in gpu_gib:
        raise UserError(f"-g must give --gpu-id {gpu_id} its share, it names {', '.join(map(str, gpu_gib))}")
    for number in gpu_gib or ():
        if number >= count:
            hardware.choose_device(gpu=number)
    return device


def choose_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """Return the precision that `name` means to compute in.

    "int8" applies to the weights alone: it computes as "auto" does, but on the CPU in bfloat16, as its operator needs.
    """
    if name == "int8" and device.type == "cpu":
        return torch.bfloat16
    return hardware.choose_dtype("auto" if name == "int8" else name, device, parameters=parameters, flag="--dtype")


def placement(device: torch.device, gpu_gib: Mapping[int, float] | None, cpu_gib: float | None) -> dict[str, object]:
    """The options of `from_pretrained` that put weights where they belong; an empty dict leaves them in main memory."""
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if gpu_gib is None and cpu_gib is None:
        # Straight to the GPU, so that main memory need not hold the model too.
        return {"device_map": {"": device}} if device.type == "cuda" and has_accelerate else {}
    if not has_accelerate:
        raise UserError("-g and -r need accelerate, which is not installed: pip install accelerate")
    import psutil  # type: ignore[import-untyped]  # accelerate needs it, so it is there

    limits: dict[int | str, int] = {number: int(gib * GIB) for number, gib in (gpu_gib or {}).items()}
    if gpu_gib is None and device.type == "cuda":
        limits[device.index] = int(0.9 * torch.cuda.mem_get_info(device)[0])
    limits["cpu"] = int(0.9 * psutil.virtual_memory().available if cpu_gib is None else cpu_gib * GIB)
    # Layers fill the devices in this order. What is left over is read from the model's own files as it is needed.
    return {"device_map": "sequential", "max_memory": limits, "offload_folder": None}


def quantisation_options(
    bits: int, dtype: torch.dtype, device: torch.device, gpu_gib: Mapping[int, float] | None
) -> dict[str, object]:
    """The options of `from_pretrained` that make bitsandbytes quantise to 8 or 4 `bits`; `gpu_gib` spreads over GPUs.

    4 bits are NormalFloat (Dettmers et al. 2023, QLoRA), computed with in `dtype`; 8 are LLM.int8() (Dettmers et al.
    2022). The output layer and the embedding stay as they are.
    """
    for name in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--load-{bits}bit needs {name}, which is not installed: pip install {name}, or try --dtype int8"
            )
    from transformers import BitsAndBytesConfig

    kind = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**kind, **({"bnb_4bit_compute_dtype": dtype} if bits == 4 else {}))
    where: dict[str, object] = {"device_map": {"": device}}
    if gpu_gib is not None:
        where = {
            "device_map": "sequential",
            "max_memory": {number: int(gib * GIB) for number, gib in gpu_gib.items()},
        }
    return {"quantization_config": config, **where}


def check_combination(dtype: str, bits: int | None, gpu_gib: Mapping[int, float] | None, cpu_gib: float | None) -> None:
    """UserError for ways of quantising and of spreading a model that do not go together."""
    if bits is not None and dtype == "int8":
        raise UserError(f"--dtype int8 and --load-{bits}bit both quantise: give one of them")
    if dtype == "int8" and (gpu_gib is not None or cpu_gib is not None):
        raise UserError(
            "--dtype int8 keeps the model on one device: leave out -g and -r, or spread it with --dtype bfloat16"
        )
    if bits is not None and cpu_gib is not None:
        raise UserError(
            f"--load-{bits}bit keeps weights where they are computed with: leave out -r, which keeps some of them "
            "elsewhere, or leave out the quantising"
        )


def check_four_bits(model: nn.Module, device: torch.device) -> None:
    """UserError where bitsandbytes would fail at the first token: on the CPU it packs 64 inputs by 32 outputs."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    odd = [layer for layer in layers if layer.in_features % 64 or layer.out_features % 32]
    if device.type == "cpu" and odd:
        raise UserError(
            "--load-4bit takes layers of multiples of 64 inputs and 32 outputs on the CPU, this model has one of "
            f"{odd[0].in_features} and {odd[0].out_features}: try --load-8bit or --dtype int8"
        )
