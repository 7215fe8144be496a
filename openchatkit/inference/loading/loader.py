"""A model and its tokenizer from a folder or the hub, on the device and in the precision that were asked for.

Owns finding the model, saying what a folder is that is none, and loading it. Where its weights go is `placement`'s, how
fast layers are made of them `linear`'s and `attention`'s; what the model's files look like is `formats`', how they are
downloaded `download`'s.

Weights are memory-mapped: nothing is read before it is used, and main memory holds what is used most. What computes
faster in another form is copied, layer by layer, if memory allows.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.download.sources import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint_folders, hf_model, layer_shards, legacy
from openchatkit.inference.engine import attention, linear, neox
from openchatkit.inference.engine.engine import is_out_of_memory
from openchatkit.inference.loading import int8, placement
from openchatkit.libraries import hf_transformers
from openchatkit.paths import HUGGINGFACE_MODELS

EXAMPLE = "togethercomputer/Pythia-Chat-Base-7B"


@dataclass(frozen=True)
class Loaded:
    """A model ready to go on from tokens: its tokenizer, where its inputs belong, and the ids that end a reply.

    `dtype` is what it computes in, `folder` where it came from, and `cache_dtype` the precision that its keys and
    values are best kept in (None: what they come in).
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
) -> Loaded:
    """Load the model that `name` means, a folder or a hub name.

    `dtype` "int8" is this kit's own quantising, `bits` 8 or 4 is bitsandbytes'. `gpu_gib` (by GPU) and `cpu_gib` limit
    what the weights fill; what they leave stays on disk. `announce` is told in one line what is being loaded.
    UserError when it is no model, or does not fit together or on the device.
    """
    placement.check_combination(dtype, bits, gpu_gib, cpu_gib)
    device = placement.choose_device(gpu_id, gpu_gib)
    folder = find_model(name)
    # The configuration first: what is wrong with it would be said to be wrong with the tokenizer.
    config = _read(lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), folder)
    parameters = _read(lambda: _parameters(config), folder)
    tokenizer, words = Tokenizer(folder), config.get_text_config().vocab_size
    if tokenizer.used_size > words:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {words}: they do not belong "
            "together, copy the tokenizer that the model was trained with"
        )
    precision = placement.choose_dtype(dtype, device, parameters)
    stored = "int8" if dtype == "int8" else f"{bits} bits" if bits else str(precision).removeprefix("torch.")
    announce(f"loading {name}, {_rounded(parameters)} parameters, on {device} in {stored}")
    if dtype == "int8":
        model = _load_model(folder, "auto", {})
        _read(lambda: int8.quantise(model, folder, device, precision), folder)
    else:
        spread = placement.placement(device, gpu_gib, cpu_gib) if bits is None else None
        options = placement.quantised(bits, precision, device, gpu_gib) if bits else spread
        on_cpu = device.type == "cpu" and not options
        model = _load_model(folder, "auto" if on_cpu else precision, options)
        if bits == 4:
            placement.check_four_bits(model, device)
        if on_cpu:
            # What is copied may come from mapped files, so that nothing is freed for it; a fifth is for the rest.
            room = 0.8 * placement.available_memory()
            _read(lambda: linear.prepare(model, precision, room=room), folder)
        elif not options:
            model = _read(lambda: model.to(device), folder)
    # Where the model is spread over several devices, its attention is left alone.
    fast = device.type == "cpu" and attention.use(model)
    if fast:
        neox.use(model)
    cache_dtype = attention.CACHE_DTYPE if fast else None
    return Loaded(model.eval(), tokenizer, device, precision, _ends(model, tokenizer, folder), folder, cache_dtype)


def quiet() -> None:
    """Keep the libraries' own notes and bars off the terminal; what matters of them is checked and said here."""
    hf_transformers.silence()
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def find_model(name: str) -> Path:
    """The folder of a model, downloaded if `name` is no folder but can be a hub name; UserError says what was found."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            check_folder(path)
            return path
        if path.exists():
            raise UserError(f"--model {name} is a file: expected a model's folder, or a hub name such as {EXAMPLE}")
        local = len(path.parts) != 2 or name.startswith((".", "~", "/")) or path.parent.is_dir()
        made = ", ".join(sorted(entry.name for entry in HUGGINGFACE_MODELS.glob("*/"))[:8]) or "nothing yet"
    except OSError as error:
        raise UserError(f"--model {name} cannot be read: {error.strerror}") from error
    if local:
        raise UserError(
            f"--model {name}: no such folder; {HUGGINGFACE_MODELS.name}/ holds {made}; make a model with "
            f"tools/convert_to_hf_gptneox.py, or pass a hub name such as {EXAMPLE}"
        )
    small = (*hf_model.SMALL_FILES, hf_model.GENERATION_CONFIG)
    return fetch_model(name, small, hf_model.SAFE_FILES, hf_model.PICKLED_FILES)


def check_folder(path: Path) -> None:
    """UserError unless a folder holds a Hugging Face model, naming what it holds instead and what to run."""
    weights = (hf_model.WEIGHTS, hf_model.WEIGHTS_INDEX, hf_model.PICKLED, hf_model.PICKLED_INDEX)
    if (path / layer_shards.CONFIG).is_file() and any((path / name).is_file() for name in weights):
        return
    steps = checkpoint_folders.list_steps(path)
    if steps or checkpoint_folders.parse_step(path.name) is not None or legacy.stage_files(path):
        what = f"a folder of training checkpoints (the newest is {steps[-1]})" if steps else "a training checkpoint"
        raise UserError(f"--model {path} is {what}, not a Hugging Face model: {_convert(path, steps)}")
    first = "embed"
    if any((path / name).is_file() for name in (layer_shards.shard_file(first), legacy.shard_file(first))):
        raise UserError(
            f"--model {path} holds layer shards, which training starts from, not a Hugging Face model: pass the model "
            "that they were made from, or train them and convert the checkpoint with tools/convert_to_hf_gptneox.py"
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    lacking = weights[0] if (path / layer_shards.CONFIG).is_file() else layer_shards.CONFIG
    raise UserError(
        f"--model {path} is no Hugging Face model: {lacking} is missing, found {found}; pass a folder that "
        f"tools/convert_to_hf_gptneox.py wrote, or a hub name such as {EXAMPLE}"
    )


def _load_model(folder: Path, dtype: torch.dtype | str, options: Mapping[str, object]) -> PreTrainedModel:
    """The model as transformers loads it: without `options`, mapped if it is stored in `dtype` ("auto" is that)."""
    model, info = _read(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name the tensor below
            **options,
        ),
        folder,
    )
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise UserError(
            f"{folder} does not fit its {layer_shards.CONFIG}: {key} is of shape {list(stored)}, expected "
            f"{list(expected)}; copy both from the same model"
        )
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} first: fetch or copy it again"
        )
    return model


def _ends(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> frozenset[int]:
    """The ids that end a reply: those that the model's files name, else the tokenizer's end-of-text."""
    given = model.generation_config.eos_token_id
    ids = [tokenizer.end_of_text] if given is None else given if isinstance(given, list) else [given]
    if not all(type(id) is int for id in ids):
        raise UserError(f"eos_token_id of the model in {folder} is {given!r}: expected a token id or a list of them")
    return frozenset(ids)


def _parameters(config: object) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if hf_transformers.cache_argument(model) is None:
        # Its past would be ignored, and each token follow from the last one alone.
        raise UserError(
            f"it is a {config.model_type}, which keeps no keys and values of what it has read: expected a transformer "
            "such as GPT-NeoX, GPT-J or Llama"
        )
    return model.num_parameters()


def _rounded(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def _read(action: Callable[[], object], folder: Path) -> object:
    """What `action` returns; whatever the libraries raise on a damaged or foreign folder becomes one line."""
    try:
        return action()
    except Exception as error:  # they raise OSError, ValueError, RuntimeError, KeyError and errors of their own
        if is_out_of_memory(error):
            raise UserError(
                f"{folder} does not fit into memory: spread it with -g ID:GiB ... and -r GiB, or try --dtype bfloat16 "
                "or int8"
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the model in {folder} cannot be loaded: {reason}") from error


def _convert(path: Path, steps: list[int]) -> str:
    where = checkpoint_folders.find(path, steps[-1]) if steps else path
    family = "gptneox"
    if (where / layer_shards.CONFIG).is_file() and layer_shards.read_config(where)[1].family == "gptj":
        family = "gptj"
    target = HUGGINGFACE_MODELS.name + "/NAME"
    return (
        f"run `python tools/convert_to_hf_{family}.py --ckpt-path {where} --save-path {target}` and pass "
        f"--model {target}"
    )
