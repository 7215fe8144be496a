"""Which kind of model a folder holds: layer shards, a training checkpoint, a Hugging Face or a GPT-NeoX model.

Reads no weights: `stages` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, hf_model, neox_layout
from openchatkit.formats.layer_shards import CONFIG, JOURNAL, LayerShards

HUGGING_FACE, SHARDS, CHECKPOINT = "Hugging Face model", "layer shards", "training checkpoint"
GPT_NEOX = "GPT-NeoX checkpoint"
_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model, and which of the four kinds it is."""

    path: Path
    kind: str


def find(path: Path) -> ModelFolder:
    """Find the model that a path means: the folder itself, or the latest checkpoint in it; UserError without one.

    A Hugging Face model with its configuration comes first, whatever else its folder holds.
    """
    if holds_hugging_face(path):
        return ModelFolder(path, HUGGING_FACE)
    if folder := neox_layout.find(path):
        return ModelFolder(folder, GPT_NEOX)
    if any((path / file).is_file() for file in hf_model.WEIGHT_FILES):
        return ModelFolder(path, HUGGING_FACE)
    is_step = (path / checkpoint.STATE).exists() or checkpoint.parse_step(path.name) is not None
    if is_step or checkpoint.list_steps(path) or checkpoint.is_legacy(path):
        path = checkpoint.locate(path)
        if checkpoint.is_legacy(path):
            raise UserError(
                f"{path} is a checkpoint of the original kit, which does not say what model it is: "
                "convert it with tools/convert_to_hf_gptneox.py and pass the folder that makes"
            )
        return ModelFolder(path, CHECKPOINT)
    if not (path / CONFIG).is_file() and not (path / JOURNAL).is_file():
        raise UserError(
            f"{path} holds no model: neither GPT-NeoX's layer files, {neox_layout.EXAMPLE} and so on, nor a "
            "Hugging Face model, a training checkpoint, or layer shards, which pretrained/GPT-NeoX-20B/prepare.py makes"
        )
    return ModelFolder(LayerShards.open(path).path, SHARDS)


def holds_hugging_face(path: Path) -> bool:
    """Return whether a folder holds a Hugging Face model: its configuration and weights."""
    return (path / CONFIG).is_file() and any((path / file).is_file() for file in hf_model.WEIGHT_FILES)


def read_live(path: Path, read: Callable[[ModelFolder], _T]) -> _T:
    """Return what `read` makes of the model that a path means (see `find`), whose run may still be training.

    Where the run wrote a newer checkpoint, and perhaps deleted this one, while it was read in vain, that one is read.
    """
    while True:
        before = checkpoint.read_latest(path)
        try:
            return read(find(path))
        except (OSError, UserError):
            if checkpoint.read_latest(path) == before:
                raise
