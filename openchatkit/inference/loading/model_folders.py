"""Finding a model: its folder, a download from the hub, or an explanation of what a folder holds instead."""

from pathlib import Path

from openchatkit.download.sources import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, hf_model, layer_shards, legacy
from openchatkit.paths import HUGGINGFACE_MODELS

EXAMPLE = "togethercomputer/Pythia-Chat-Base-7B"


def find_model(name: str) -> Path:
    """Return the folder of a model, downloaded if `name` can only be a hub name; UserError says what was found."""
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
    """Raise UserError unless a folder holds a Hugging Face model; it names what the folder holds and what to run."""
    weights = (hf_model.WEIGHTS, hf_model.WEIGHTS_INDEX, hf_model.PICKLED, hf_model.PICKLED_INDEX)
    if (path / layer_shards.CONFIG).is_file() and any((path / name).is_file() for name in weights):
        return
    steps = checkpoint.list_steps(path)
    if steps or checkpoint.parse_step(path.name) is not None or legacy.stage_files(path):
        what = f"a folder of training checkpoints (the newest is {steps[-1]})" if steps else "a training checkpoint"
        raise UserError(f"--model {path} is {what}, not a Hugging Face model: {_advise_conversion(path, steps)}")
    first = "embed"
    if any((path / name).is_file() for name in (layer_shards.shard_file(first), legacy.shard_file(first))):
        raise UserError(
            f"--model {path} holds layer shards, which training starts from, not a Hugging Face model: pass the model "
            "that they were made from, or train them and convert the checkpoint with tools/convert_to_hf_gptneox.py"
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    lacking = weights[0] if (path / layer_shards.CONFIG).is_file() else layer_shards.CONFIG
    raise UserError(
        f"--model {path} is not a Hugging Face model: {lacking} is missing, found {found}; pass a folder that "
        f"tools/convert_to_hf_gptneox.py wrote, or a hub name such as {EXAMPLE}"
    )


def _advise_conversion(path: Path, steps: list[int]) -> str:
    where = (checkpoint.find(path, steps[-1]) if steps else None) or path
    family = "gptneox"
    if (where / layer_shards.CONFIG).is_file() and layer_shards.read_config(where)[1].family == "gptj":
        family = "gptj"
    target = HUGGINGFACE_MODELS.name + "/NAME"
    return (
        f"run `python tools/convert_to_hf_{family}.py --ckpt-path {where} --save-path {target}` and pass "
        f"--model {target}"
    )
