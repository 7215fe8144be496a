"""The checkpoint in the folder `load` of a GPT-NeoX configuration, with its tokenizer, to generate and evaluate with.

It may be the kit's own, of a run that is still training too, or GPT-NeoX's.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, neox_layout, neox_tokenizers
from openchatkit.loading import model_kinds, stages
from openchatkit.neox import model
from openchatkit.neox.config import NeoxConfig

# What the configuration and the checkpoint must agree on, by GPT-NeoX's names and the kit's.
_SHARED = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_position_embeddings",
}


def find_trained(config: NeoxConfig) -> Path:
    """Return the folder of `load`, or of the checkpoint of `iteration` in it; UserError where none is there.

    UserError, too, where the configuration is of a model of other sizes than the checkpoint.
    """
    if config.get("load") is None:
        raise UserError("load is not given: name the folder of the checkpoints, as training's save does")
    load, step = Path(config.get("load")), config.get("iteration")
    steps = _list_steps(load)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{config.where('iteration')}: {load} has no checkpoint of it: there are {there}")
    if not steps and not neox_layout.find(load):
        found = "it is no folder" if not load.is_dir() else "it holds no checkpoint"
        raise UserError(f"{config.where('load')}: {found}: train first, or name the folder that training saved to")
    path = load if step is None else steps[step]
    _check_sizes(config, path)
    return path


def _list_steps(load: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by step, of either kind, from the oldest to the newest."""
    ours = {step: path for step in checkpoint.list_steps(load) if (path := checkpoint.find(load, step))}
    named = ((neox_layout.parse_step(path.name), path) for path in neox_layout.list_steps(load))
    theirs = {step: path for step, path in named if step is not None}
    return dict(sorted({**theirs, **ours}.items()))


def _check_sizes(config: NeoxConfig, path: Path) -> None:
    """Raise UserError where the configuration gives a size that is not the checkpoint's."""
    found = model_kinds.read_live(path, lambda found: stages.open_shards(found, verify=False).config)
    for name, ours in _SHARED.items():
        if name in config.given and config.get(name) != getattr(found, ours):
            raise UserError(
                f"{config.where(name)}: the checkpoint in {path} has {getattr(found, ours)}: give the configuration "
                "that it was trained by"
            )


@contextlib.contextmanager
def open_tokenizer(config: NeoxConfig, path: Path) -> Iterator[Path | None]:
    """Yield the folder of the tokenizer of GPT-NeoX's own checkpoint, the configuration's; None where it has its own.

    The kit's checkpoints hold the one that they were trained with.
    """
    if not neox_layout.find(path) or "tokenizer_type" not in config.given:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        neox_tokenizers.write(model.load_tokenizer(config), Path(folder))
        yield Path(folder)
