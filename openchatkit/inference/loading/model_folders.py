"""Finding a model: its folder, a download from the hub, or an explanation of what a folder holds instead."""

from pathlib import Path

from openchatkit.download.sources import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, hf_model, layer_shards, legacy, neox_layout
from openchatkit.loading.model_kinds import HUGGING_FACE, ModelFolder, find, holds_hugging_face
from openchatkit.paths import HUGGINGFACE_MODELS

EXAMPLE = "togethercomputer/Pythia-Chat-Base-7B"


def find_model(name: str) -> ModelFolder:
    """Find a model, downloaded if `name` can only be a hub name; UserError says what was found.

    A run's folder means its newest checkpoint.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _identify(path)
        if path.exists():
            raise UserError(f"--model {name} is a file: expected a model's folder, or a hub name such as {EXAMPLE}")
        if checkpoint.list_steps(path.parent) and checkpoint.parse_step(path.name) is not None:
            return find(path)
        local = len(path.parts) != 2 or name.startswith((".", "~", "/")) or path.parent.is_dir()
        made = ", ".join(sorted(entry.name for entry in HUGGINGFACE_MODELS.glob("*/"))[:8]) or "nothing yet"
    except OSError as error:
        raise UserError(f"--model {name} cannot be read: {error.strerror}") from error
    if local:
        raise UserError(
            f"--model {name}: no such folder; {HUGGINGFACE_MODELS.name}/ holds {made}; give a training checkpoint, a "
            f"model that tools/convert_to_hf_gptneox.py made, or a hub name such as {EXAMPLE}"
        )
    small = (*hf_model.SMALL_FILES, hf_model.GENERATION_CONFIG)
    fetched = fetch_model(name, small, hf_model.SAFE_FILES, hf_model.PICKLED_FILES)
    return ModelFolder(fetched, HUGGING_FACE)


def _identify(path: Path) -> ModelFolder:
    """Return which kind of model a folder holds; UserError names what it holds else."""
    if holds_hugging_face(path):
        return ModelFolder(path, HUGGING_FACE)
    shards = (layer_shards.shard_file("embed"), legacy.shard_file("embed"), layer_shards.JOURNAL)
    is_step = checkpoint.is_checkpoint(path) or checkpoint.parse_step(path.name) is not None
    if is_step or checkpoint.list_steps(path) or neox_layout.find(path):
        return find(path)
    if any((path / name).is_file() for name in shards):
        return find(path)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    lacking = hf_model.WEIGHTS if (path / layer_shards.CONFIG).is_file() else layer_shards.CONFIG
    raise UserError(
        f"--model {path} is not a Hugging Face model: {lacking} is missing, found {found}; pass a training checkpoint, "
        f"a folder that tools/convert_to_hf_gptneox.py wrote, or a hub name such as {EXAMPLE}"
    )
