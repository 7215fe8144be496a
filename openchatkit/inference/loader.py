"""A model and its tokenizer from a folder or the hub, on the device and in the precision that were asked for.

Owns finding the model, saying what a folder is that is none, and placing it. What the model's files look like is
`formats`', how they are downloaded `download`'s.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.download import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint_folders, hf_model, layer_shards, legacy
from openchatkit.inference.engine import is_out_of_memory
from openchatkit.paths import HUGGINGFACE_MODELS

GIB = 1 << 30
# Up to this many parameters the CPU computes in float32, which is exact; above, reading the weights is what takes time.
SMALL = 10**9
EXAMPLE = "togethercomputer/Pythia-Chat-Base-7B"


@dataclass(frozen=True)
class Loaded:
    """A model ready to go on from tokens: its tokenizer, where its inputs belong, and the ids that end a reply."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]


def load(
    name: str,
    *,
    gpu_id: int = 0,
    dtype: str = "auto",
    gpu_gib: Mapping[int, float] | None = None,
    cpu_gib: float | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Load the model that `name` means, a folder or a hub name.

    `gpu_gib` (by GPU) and `cpu_gib` limit what the weights fill; what they leave stays on disk. `announce` is told in
    one line what is being loaded. UserError when it is no model, or does not fit together or on the device.
    """
    device = choose_device(gpu_id, gpu_gib)
    folder = find_model(name)
    tokenizer = Tokenizer(folder)
    config = _read(lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: they do not "
            "belong together, copy the tokenizer that the model was trained with"
        )
    precision = choose_dtype(dtype, device, lambda: _parameters(config))
    announce(f"loading {name} on {device} in {str(precision).removeprefix('torch.')}")
    options = placement(device, gpu_gib, cpu_gib)
    model = _load_model(folder, precision, options)
    if not options:
        model = _read(lambda: model.to(device), folder)
    eos = model.generation_config.eos_token_id
    eos_ids = [tokenizer.end_of_text] if eos is None else [eos] if isinstance(eos, int) else eos
    return Loaded(model.eval(), tokenizer, device, precision, frozenset(eos_ids))


def quiet() -> None:
    """Keep the libraries' own notes and bars off the terminal; what matters of them is checked and said here."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
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


def choose_device(gpu_id: int, gpu_gib: Mapping[int, float] | None) -> torch.device:
    """CUDA's `gpu_id`, else Apple's MPS, else the CPU; UserError for GPUs that are not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_gib is not None and not count:
        raise UserError("-g names GPUs, and torch finds none here: leave it out, -r limits main memory alone")
    if gpu_gib is not None and gpu_id not in gpu_gib:
        raise UserError(f"-g must give --gpu-id {gpu_id} its share, it names {', '.join(map(str, gpu_gib))}")
    if count and (unknown := [number for number in (gpu_id, *(gpu_gib or ())) if number >= count]):
        raise UserError(f"there is no GPU {unknown[0]}: torch finds {count}, numbered from 0")
    if count:
        return torch.device("cuda", gpu_id)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device, parameters: Callable[[], int]) -> torch.dtype:
    """The precision that `name` means; "auto" looks at the device, and on the CPU at the number of `parameters`."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.float32 if parameters() <= SMALL else torch.bfloat16


def placement(device: torch.device, gpu_gib: Mapping[int, float] | None, cpu_gib: float | None) -> dict[str, object]:
    """The options of `from_pretrained` that put weights where they belong; none leaves them in main memory."""
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if gpu_gib is None and cpu_gib is None:
        # Straight to the GPU, so that main memory need not hold the model too.
        return {"device_map": {"": device}} if device.type == "cuda" and has_accelerate else {}
    if not has_accelerate:
        raise UserError("-g and -r need accelerate, which is not installed: pip install accelerate")
    import psutil  # accelerate needs it, so it is there

    limits: dict[int | str, int] = {number: int(gib * GIB) for number, gib in (gpu_gib or {}).items()}
    if gpu_gib is None and device.type == "cuda":
        limits[device.index] = int(0.9 * torch.cuda.mem_get_info(device)[0])
    limits["cpu"] = int(0.9 * psutil.virtual_memory().available if cpu_gib is None else cpu_gib * GIB)
    # Layers fill the devices in this order. What is left over is read from the model's own files as it is needed.
    return {"device_map": "sequential", "max_memory": limits, "offload_folder": None}


def _load_model(folder: Path, dtype: torch.dtype, options: Mapping[str, object]) -> PreTrainedModel:
    model, info = _read(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        ),
        folder,
    )
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} first: fetch or copy it again"
        )
    return model


def _parameters(config: object) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _read(action: Callable[[], object], folder: Path) -> object:
    """What `action` returns; whatever the libraries raise on a damaged or foreign folder becomes one line."""
    try:
        return action()
    except Exception as error:  # they raise OSError, ValueError, RuntimeError, KeyError and errors of their own
        if is_out_of_memory(error):
            raise UserError(
                f"{folder} does not fit into memory: spread it with -g ID:GiB ... and -r GiB, or try --dtype bfloat16"
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
