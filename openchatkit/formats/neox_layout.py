"""Names of GPT-NeoX's checkpoints (github.com/EleutherAI/gpt-neox): folders, files and tensors, in both directions.

    latest
    global_step<n>/  layer_<ii>-model_<rr>-model_states.pt ...  mp_rank_<rr>_model_states.pt ...  configs/*.yml

Layer 0 is the embedding, 2 to L + 1 are the blocks, L + 3 is the final norm and L + 4 the projection (missing where it
is tied to the embedding); the others hold nothing. Each has a file for every rank of tensor parallelism. A model that
was trained without a pipeline is in the second kind of files alone, under `module`, as `sequential.<layer>.<tensor>`;
beside layer files they hold no tensors, and DeepSpeed reads the step from them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.models.config import ModelConfig
from openchatkit.models.shards import HEAD, layer_number

LATEST = "latest"
STEP_PREFIX = "global_step"
CONFIGS = "configs"
TENSORS = "module"  # the entry of a file of all layers that holds them
EXAMPLE = "layer_00-model_00-model_states.pt"
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
WHOLE_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
IN_WHOLE_FILE = re.compile(r"sequential\.(\d+)\.(.+)")
# Biases of projections whose results are added up over tensor ranks.
ADDED_BIASES = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
QK_NORM = "attention.qk_layernorm."
_OUR_MODULES = {"word_embeddings": "embed_in", "norm": "final_layer_norm", "final_linear": "embed_out"}
_THEIR_MODULES = {ours: theirs for theirs, ours in _OUR_MODULES.items()}
# Frequencies of rotary and sinusoidal positions, and ALiBi's slopes.
_BUFFERS = ("inv_freq", "slopes")
# GPT-NeoX's names since December 2024, and before, which are also the kit's.
_MLP = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}
_NEWER_MLP = {ours: theirs for theirs, ours in _MLP.items()}


def step_folder(step: int) -> str:
    """Return the name of a step's folder."""
    return f"{STEP_PREFIX}{step}"


def parse_step(name: str) -> int | None:
    """Return the step in a folder's name; None for other names."""
    number = name.removeprefix(STEP_PREFIX)
    return int(number) if name != number and number.isdecimal() else None


def find(path: Path) -> Path | None:
    """Return a step's folder for a path: itself, the one that `latest` names, or the only one inside.

    None where there is no checkpoint of GPT-NeoX. UserError where `latest` names a step that is missing, or none of
    several.
    """
    if not path.is_dir():
        return None
    steps = list_steps(path)
    if steps == [path]:
        return path
    latest = path / LATEST
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if named.startswith(STEP_PREFIX):
        if path / named not in steps:
            there = ", ".join(folder.name for folder in steps) or "none"
            raise UserError(f"{latest} says {named}, which is not there ({there} is): give a step's folder itself")
        return path / named
    if len(steps) > 1:
        listed = ", ".join(folder.name for folder in steps)
        raise UserError(f"{path} holds {listed}, and no {LATEST} names one: give one of them")
    return steps[0] if steps else None


def layer_file(layer: int, rank: int) -> str:
    """Return the name of the file with a tensor rank's part of a layer."""
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def whole_file(rank: int) -> str:
    """Return the name of the file with the state of a tensor rank, and with all of its layers without a pipeline."""
    return f"mp_rank_{rank:02d}_model_states.pt"


def in_whole_file(layer: int, key: str) -> str:
    """Return the name that a tensor of a layer has in a file of all layers."""
    return f"sequential.{layer}.{key}"


def shard_layers(config: ModelConfig, shard: str) -> list[int]:
    """Return GPT-NeoX's numbers of the layers that a shard is made of."""
    count = config.num_layers
    if shard == HEAD:
        return [count + 3] if config.tie_embeddings else [count + 3, count + 4]
    number = layer_number(shard)
    return [0 if number is None else number + 2]


def list_layers(count: int, *, tied: bool) -> list[int]:
    """Return the numbers of the layers that a network of `count` blocks stores."""
    return [0, *range(2, count + 2), count + 3, *([] if tied else [count + 4])]


def our_name(key: str) -> str | None:
    """Return a tensor's name in its shard, for either of GPT-NeoX's namings; None for a buffer of nothing learnt."""
    module, _, kind = key.rpartition(".")
    if kind in _BUFFERS:
        return None
    return f"{_OUR_MODULES.get(module) or _MLP.get(module, module)}.{kind}"


def their_name(name: str, *, newer: bool) -> str:
    """Return GPT-NeoX's name of a shard's tensor; `newer`, since December 2024."""
    module, _, kind = name.rpartition(".")
    renamed: Mapping[str, str] = _THEIR_MODULES | (_NEWER_MLP if newer else {})
    return f"{renamed.get(module, module)}.{kind}"


def list_steps(path: Path) -> list[Path]:
    """Return the folders of steps that a path means: itself, or those in it."""
    return (
        [path]
        if is_checkpoint(path)
        else [each for each in sorted(path.glob(f"{STEP_PREFIX}*")) if is_checkpoint(each)]
    )


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds the weights of a step, in either kind of files."""
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return any(LAYER_FILE.fullmatch(name) or WHOLE_FILE.fullmatch(name) for name in entries)
