"""A model and its tokenizer from a folder or the hub, on the requested device and in the requested precision.

Owns loading. Finding a model, and explaining what other folders hold, is `model_folders`'; what makes a training
checkpoint one for transformers is `kit_folders`'; where its weights go is `placement`'s, how fast layers are made of
them `linear`'s and `attention`'s.

Weights are memory-mapped: nothing is read before it is used, and main memory holds what is used most. What computes
faster in another form is copied, layer by layer, if memory allows.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
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

if TYPE_CHECKING:  # what a chat with a Hugging Face model does without
    from openchatkit.loading.model_kinds import ModelFolder
    from openchatkit.loading.stages import ShardReader
    from openchatkit.models.stage import Stage

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate: its tokenizer, the device of its inputs, and the ids that end a reply.

    The model is transformers', or the kit's own where transformers has none of its family. `dtype` is its computing
    precision, `folder` its source, and `cache_dtype` the precision that its keys and values are best kept in (None: the
    model's).
    """

    model: "PreTrainedModel | Stage"
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
    tokenizer: Path | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> LoadedModel:
    """Load the model that `name` means: a folder of Hugging Face's, of GPT-NeoX's or of ours, or a hub name.

    `dtype` "int8" is this kit's own quantising, `bits` 8 or 4 is bitsandbytes'. `gpu_gib` (by GPU) and `cpu_gib` limit
    the memory that the weights fill; the rest stays on disk. `tokenizer` is the folder of another than the
    model's own, where that is in no folder of Hugging Face's. `announce` gets one line on what is being loaded.
    UserError when it is not a model, or its parts do not fit together, or it does not fit on the device.
    """
    placement.check_combination(dtype, bits, gpu_gib, cpu_gib)
    device = placement.choose_device(gpu_id, gpu_gib)
    weights = _Weights(name, device, dtype, bits, gpu_gib, cpu_gib, tokenizer, announce)
    folder = Path(name).expanduser()
    if os.path.isfile(folder / CONFIG_NAME) and any(os.path.isfile(folder / file) for file in _WEIGHTS):
        return weights.load(folder)
    from openchatkit.inference.loading.model_folders import find_model
    from openchatkit.loading import model_kinds

    found = find_model(name)
    if found.kind == model_kinds.HUGGING_FACE:
        return weights.load(found.path)
    return model_kinds.read_live(folder, weights.load_other)


@dataclass(frozen=True)
class _Weights:
    """How a model's weights are asked for; see `load`."""

    name: str
    device: torch.device
    dtype: str
    bits: int | None
    gpu_gib: Mapping[int, float] | None
    cpu_gib: float | None
    tokenizer: Path | None
    announce: Callable[[str], None]

    def load_other(self, found: "ModelFolder") -> LoadedModel:
        """Load a model that is in no folder of Hugging Face's: by transformers if it has such a network, else ours."""
        from openchatkit.inference.loading import kit_folders
        from openchatkit.loading import stages

        reader = stages.open_shards(found)
        with tempfile.TemporaryDirectory() as described:
            folder = Path(described)
            kit_folders.write_tokenizer(found, folder, other=self.tokenizer)
            if not hf_transformers.has_causal_lm(reader.raw_config["model_type"]):
                return self._load_stage(found, reader, Tokenizer(folder))
            if self.cpu_gib is not None:
                raise UserError(
                    f"-r leaves weights in a Hugging Face model's own files, and {found.path} is a {found.kind}: leave "
                    "it out, or convert the model with tools/convert_to_hf_gptneox.py"
                )
            kit_folders.write_description(reader, folder)
            loaded = self.load(folder, kit_folders.read_tensors(reader))
        return replace(loaded, folder=found.path)

    def load(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> LoadedModel:
        """Load a folder of Hugging Face's, or what `tensors` make of its small files."""
        where = folder if tensors is None else Path(self.name)
        device, dtype, bits, gpu_gib, cpu_gib = self.device, self.dtype, self.bits, self.gpu_gib, self.cpu_gib
        # The configuration first: an error in it would be reported as the tokenizer's.
        with _one_line_errors(where):
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            parameters = _count_parameters(config)
        tokenizer = Tokenizer(folder)
        _check_vocabulary(self.name, tokenizer, config.get_text_config().vocab_size)
        precision = placement.choose_dtype(dtype, device, parameters)
        self._announce(parameters, precision)
        if dtype == "int8":
            from openchatkit.inference.loading import int8

            model = _load_model(folder, "auto", {}, tensors, where)
            with _one_line_errors(where):
                int8.quantise(model, None if tensors else folder, device, precision)
        else:
            spread = placement.placement(device, gpu_gib, cpu_gib) if bits is None else {}
            options = placement.quantisation_options(bits, precision, device, gpu_gib) if bits else spread
            on_cpu = device.type == "cpu" and not options
            model = _load_model(folder, "auto" if on_cpu else precision, options, tensors, where)
            if bits == 4:
                placement.check_four_bits(model, device)
            with _one_line_errors(where):
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
        eos_ids = _eos_ids(model.generation_config.eos_token_id, tokenizer, where)
        return LoadedModel(model.eval(), tokenizer, device, precision, eos_ids, folder, cache_dtype)

    def _load_stage(self, found: "ModelFolder", reader: "ShardReader", tokenizer: Tokenizer) -> LoadedModel:
        """Load a network that transformers does not have."""
        if self.dtype == "int8" or self.bits is not None or self.gpu_gib is not None or self.cpu_gib is not None:
            raise UserError(
                f"{found.path} is of the family {reader.config.family}, which runs whole, on one device and not "
                "quantised: leave out --dtype int8, --load-8bit, --load-4bit, -g and -r"
            )
        _check_vocabulary(self.name, tokenizer, reader.config.vocab_size)
        from openchatkit.loading import stages

        parameters = stages.count_parameters(found)
        precision = placement.choose_dtype(self.dtype, self.device, parameters)
        self._announce(parameters, precision)
        with _one_line_errors(found.path):
            stage = stages.load_stage(reader, self.device, precision)
        eos_ids = _eos_ids(reader.raw_config.get("eos_token_id"), tokenizer, found.path)
        return LoadedModel(stage, tokenizer, self.device, precision, eos_ids, found.path)

    def _announce(self, parameters: int, precision: torch.dtype) -> None:
        bits = f"{self.bits} bits" if self.bits else str(precision).removeprefix("torch.")
        stored = "int8" if self.dtype == "int8" else bits
        self.announce(f"loading {self.name}, {_round(parameters)} parameters, on {self.device} in {stored}")


def silence_libraries() -> None:
    """Keep the libraries' own notes and bars off the terminal; what matters of them is checked and reported here."""
    hf_transformers.silence()
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _check_vocabulary(name: str, tokenizer: Tokenizer, words: int) -> None:
    if tokenizer.used_size > words:
        raise UserError(
            f"the tokenizer in {name} has {tokenizer.vocab_size} tokens, the model {words}: they do not belong "
            "together, copy the tokenizer that the model was trained with"
        )


def _load_model(
    folder: Path,
    dtype: torch.dtype | str,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
    where: Path,
) -> PreTrainedModel:
    """The model as transformers loads it: without `options`, mapped if it is stored in `dtype` ("auto" is that).

    `tensors` are its weights if they are in no file of the folder; messages name `where` they are.
    """
    options = {**options, "ignore_mismatched_sizes": True}  # `check_complete` names the tensor
    loaded: Any
    with _one_line_errors(where):
        if tensors is None:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            loaded = hf_transformers.from_tensors(config, tensors, dtype=dtype, **options)
    model, info = loaded
    pretrained.check_complete(where, info)
    return model


def _eos_ids(given: Any, tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    """The ids that end a reply: those that the model's files name, else the tokenizer's end-of-text."""
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
