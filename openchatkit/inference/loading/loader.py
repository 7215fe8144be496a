"""A model and its tokenizer from a folder or the hub, on the requested device and in the requested precision.

Owns loading. Finding a model, and explaining what other folders hold, is `model_folders`'; where its weights go is
`placement`'s, how fast layers are made of them `linear`'s and `attention`'s.

Weights are memory-mapped: nothing is read before it is used, and main memory holds what is used most. What computes
faster in another form is copied, layer by layer, if memory allows.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.inference.engine import attention, linear, neox
from openchatkit.inference.engine.engine import is_out_of_memory
from openchatkit.inference.loading import placement
from openchatkit.libraries import hf_transformers
from openchatkit.loading import hardware, pretrained
from openchatkit.texts import reason_of

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate: its tokenizer, the device of its inputs, and the ids that end a reply.

    `dtype` is its computing precision, `folder` its source, and `cache_dtype` the precision that its keys and values
    are best kept in (None: the model's).
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]
    folder: Path
    cache_dtype: torch.dtype | None = None


def load(
    name: str,
    *,
    gpu_id: int = 0,
    dtype: str = "auto",
    bits: int | None = None,
    gpu_gib: Mapping[int, float] | None = None,
    cpu_gib: float | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> LoadedModel:
    """Load the model that `name` means, a folder or a hub name.

    `dtype` "int8" is this kit's own quantising, `bits` 8 or 4 is bitsandbytes'. `gpu_gib` (by GPU) and `cpu_gib` limit
    the memory that the weights fill; the rest stays on disk. `announce` gets one line on what is being loaded.
    UserError when it is not a model, or its parts do not fit together, or it does not fit on the device.
    """
    placement.check_combination(dtype, bits, gpu_gib, cpu_gib)
    device = placement.choose_device(gpu_id, gpu_gib)
    folder = _find_folder(name)
    # The configuration first: an error in it would be reported as the tokenizer's.
    with _one_line_errors(folder):
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        parameters = _count_parameters(config)
    tokenizer, words = Tokenizer(folder), config.get_text_config().vocab_size
    if tokenizer.used_size > words:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {words}: they do not belong "
            "together, copy the tokenizer that the model was trained with"
        )
    precision = placement.choose_dtype(dtype, device, parameters)
    stored = "int8" if dtype == "int8" else f"{bits} bits" if bits else str(precision).removeprefix("torch.")
    announce(f"loading {name}, {_round(parameters)} parameters, on {device} in {stored}")
    if dtype == "int8":
        from openchatkit.inference.loading import int8

        model = _load_model(folder, "auto", {})
        with _one_line_errors(folder):
            int8.quantise(model, folder, device, precision)
    else:
        spread = placement.placement(device, gpu_gib, cpu_gib) if bits is None else {}
        options = placement.quantisation_options(bits, precision, device, gpu_gib) if bits else spread
        on_cpu = device.type == "cpu" and not options
        model = _load_model(folder, "auto" if on_cpu else precision, options)
        if bits == 4:
            placement.check_four_bits(model, device)
        with _one_line_errors(folder):
            if on_cpu:
                # Copies of weights in mapped files free nothing, so they need room; a fifth is left for the rest.
                linear.prepare(model, precision, room=0.8 * hardware.available_memory())
            elif not options:
                nn.Module.to(model, device)
    # A model spread over several devices keeps its own attention.
    fast = device.type == "cpu" and attention.use(model)
    if fast:
        neox.use(model)
    cache_dtype = attention.CACHE_DTYPE if fast else None
    return LoadedModel(
        model.eval(), tokenizer, device, precision, _eos_ids(model, tokenizer, folder), folder, cache_dtype
    )


def silence_libraries() -> None:
    """Keep the libraries' own notes and bars off the terminal; what matters of them is checked and reported here."""
    hf_transformers.silence()
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _find_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if os.path.isfile(folder / CONFIG_NAME) and any(os.path.isfile(folder / weights) for weights in _WEIGHTS):
        return folder
    from openchatkit.inference.loading.model_folders import find_model

    return find_model(name)


def _load_model(folder: Path, dtype: torch.dtype | str, options: Mapping[str, Any]) -> PreTrainedModel:
    """The model as transformers loads it: without `options`, mapped if it is stored in `dtype` ("auto" is that)."""
    with _one_line_errors(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_complete` names the tensor
            **options,
        )
    model, info = loaded
    pretrained.check_complete(folder, info)
    return model


def _eos_ids(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    """The ids that end a reply: those that the model's files name, else the tokenizer's end-of-text."""
    given = model.generation_config.eos_token_id
    ids = [tokenizer.end_of_text] if given is None else given if isinstance(given, list) else [given]
    if not all(type(id) is int for id in ids):
        raise UserError(f"eos_token_id of the model in {folder} is {given!r}: expected a token id or a list of them")
    return frozenset(ids)


def _count_parameters(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if hf_transformers.cache_argument(model) is None:
        # Its past would be ignored, and each token follow from the last one alone.
        raise UserError(
            f"it is a {config.model_type}, which keeps no keys and values of what it has read: expected a transformer "
            "such as GPT-NeoX, GPT-J or Llama"
        )
    return model.num_parameters()


def _round(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    """Make a UserError of one line of whatever the libraries raise on a damaged or foreign folder."""
    try:
        yield
    except Exception as error:  # they raise OSError, ValueError, RuntimeError, KeyError and errors of their own
        if is_out_of_memory(error):
            raise UserError(
                f"{folder} does not fit into memory: spread it with -g ID:GiB ... and -r GiB, or try --dtype bfloat16 "
                "or int8"
            ) from error
        reason = reason_of(error)
        raise UserError(f"the model in {folder} cannot be loaded: {reason}") from error
