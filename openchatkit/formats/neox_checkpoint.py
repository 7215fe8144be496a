"""GPT-NeoX's own checkpoints (github.com/EleutherAI/gpt-neox), read and never written: how GPT-NeoX-20B was published.

    20B_tokenizer.json  latest  configs/*.yml  global_step150000/layer_<ii>-model_<rr>-model_states.pt

Layer 0 is the embedding, 2 to L + 1 are the blocks, L + 3 is the final norm and L + 4 the projection (missing where it
is tied to the embedding); the others hold nothing. Each is cut into shards of tensor parallelism, which are merged here
as GPT-NeoX's layers add them up. The yml files say what no tensor does: heads, residual, activation, rotation.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats.pickled import PickledFile
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import join_tensor
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import HEAD, layer_number, shard_names
from openchatkit.texts import reason_of

END_OF_TEXT = 0
EXAMPLE = "layer_00-model_00-model_states.pt"
_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_NAMES = {
    "word_embeddings": "embed_in",
    "norm": "final_layer_norm",
    "final_linear": "embed_out",
    "mlp.linear1": "mlp.dense_h_to_4h",
    "mlp.linear2": "mlp.dense_4h_to_h",
}
# GPT-NeoX-20B as its own yml describes it: its weights are often fetched without that file.
_PUBLISHED: dict[str, Any] = {
    "num_layers": 44,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "bias_gelu_fusion": True,
    "max_position_embeddings": 2048,
}
_DEFAULTS = {
    "norm": "layernorm",
    "pos_emb": "learned",
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "gpt_j_residual": False,
    "gpt_j_tied": False,
    "no_weight_tying": False,
    "activation": "gelu",
    "bias_gelu_fusion": False,
    "layernorm_epsilon": 1e-5,
    "max_position_embeddings": 2048,
}
_ONLY = {"norm": "layernorm", "pos_emb": "rotary", "gpt_j_tied": False}


def find(path: Path) -> Path | None:
    """Return the folder of layer files for a path: itself, the one that `latest` names, or the only one inside."""
    if not path.is_dir():
        return None
    latest = path / "latest"
    if latest.is_file():
        named = [path / latest.read_text(encoding="utf-8").strip()]
    else:
        named = sorted(path.glob("global_step*"))
    candidates: list[Path] = [path, *named] if len(named) == 1 else [path]
    for folder in candidates:
        if folder.is_dir() and any(_FILE.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder
    return None


def tokenizer_file(path: Path) -> Path | None:
    """Return the tokenizer published with GPT-NeoX-20B, in a folder or beside it; None where there is none."""
    places = (folder / "20B_tokenizer.json" for folder in (path, path.parent))
    return next((place for place in places if place.is_file()), None)


class NeoXCheckpoint:
    """A checkpoint with the interface of LayerShards: `path`, `raw_config`, `config`, `shards` and `read`.

    `path` is the folder of the layer files. UserError when files are missing, do not belong together, or describe
    a network that the kit does not support.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._ranks = _ranks(self.path)
        layers = sorted(self._ranks)
        self._settings, self._source = _settings(self.path, layers[-1])
        self._check_files(layers)
        self.raw_config = self._hf_config()
        try:
            self.config: ModelConfig = config_from_hf(self.raw_config)
        except UserError as error:
            raise UserError(f"{self._source}, read as {error}") from error
        self.shards = shard_names(self.config.num_layers)

    def read(self, shard: str) -> dict[str, Tensor]:
        """Read a shard's tensors, merged, on the CPU, in the dtype they are stored in; memory-mapped where not cut."""
        merged: dict[str, Tensor] = {}
        for layer in self._layers(shard):
            merged |= self._read_layer(layer)
        expected = family(self.config).parameter_shapes(self.config, shard)
        where = self.path / _file(self._layers(shard)[0], 0)
        if different := sorted(expected.keys() ^ merged.keys()):
            has = "lacks" if different[0] in expected else "holds"
            raise UserError(f"{where} {has} {different[0]}, unlike the network that {self._source} describes")
        for name, shape in expected.items():
            if tuple(merged[name].shape) != shape:
                raise UserError(f"{where}: {name} is {list(merged[name].shape)}, {self._source} makes it {list(shape)}")
        return merged

    def _layers(self, shard: str) -> list[int]:
        """Return the layer files of a shard, by GPT-NeoX's numbers."""
        count = self.config.num_layers
        if shard == HEAD:
            return [count + 3] if self.config.tie_embeddings else [count + 3, count + 4]
        number = layer_number(shard)
        return [0 if number is None else number + 2]

    def _open(self, layer: int) -> list[PickledFile]:
        """Open a layer's files, rank after rank; UserError unless they hold the same names in the same shapes."""
        files = [PickledFile(self.path / _file(layer, rank)) for rank in range(self._ranks[layer])]
        for file in files[1:]:
            if file.specs != files[0].specs:
                raise UserError(f"{file.path} and {files[0].path.name} hold different tensors; fetch both again")
        return files

    def _read_layer(self, layer: int) -> dict[str, Tensor]:
        files = self._open(layer)
        names = {key: _our_name(key) for key in files[0].specs if "rotary_emb." not in key}
        return {ours: self._merge(ours, [file.read([key])[key] for file in files]) for key, ours in names.items()}

    def _merge(self, name: str, parts: list[Tensor]) -> Tensor:
        """Merge the shards of one tensor, one of each rank; GPT-NeoX stores on all ranks what it does not cut."""
        cut = family(self.config).cuts(self.config).get(name, "rows")  # `read` refuses names of no parameter
        if len(parts) > 1 and cut == "once" and self._settings["gpt_j_residual"]:
            # Every rank adds its own before the ranks' results are summed.
            return torch.stack(parts).float().sum(0).to(parts[0].dtype)
        if len(parts) > 1 and cut == "whole":  # copies, which drift apart in training
            return torch.stack(parts).float().mean(0).to(parts[0].dtype)
        return join_tensor(parts, cut)

    def _check_files(self, layers: list[int]) -> None:
        """UserError unless every layer is there, on as many ranks as the tensors were cut for."""
        count, ranks = self._settings["num_layers"], self._ranks[layers[0]]
        expected = [0, *range(2, count + 2), count + 3, *([count + 4] if self._settings["no_weight_tying"] else [])]
        if left := sorted(set(layers) - set(expected)):
            raise UserError(f"{self.path / _file(left[-1], 0)} is one too many; {self._source} says {count} layers")
        if missing := sorted(set(expected) - set(layers)):
            raise UserError(f"{self.path / _file(missing[0], 0)} is missing; {self._source} says {count} layers")
        if other := [layer for layer in layers if self._ranks[layer] != ranks]:
            raise UserError(
                f"{self.path} holds {ranks} shards of layer {layers[0]} and {self._ranks[other[0]]} of layer "
                f"{other[0]}; fetch what is missing, or keep one checkpoint alone in the folder"
            )
        file = PickledFile(self.path / _file(2, 0))
        spec = file.specs.get("attention.query_key_value.weight")
        if spec is None or len(spec.shape) != 2:
            raise UserError(f"{file.path} holds no attention.query_key_value.weight; it is not a layer of GPT-NeoX")
        rows, width = spec.shape
        if rows * ranks != 3 * width:
            raise UserError(
                f"{self.path} holds {ranks} shards a layer, its tensors were cut into {3 * width / rows:g}; fetch what "
                "is missing, or keep one checkpoint alone in the folder"
            )

    def _hf_config(self) -> dict[str, Any]:
        """Return what transformers has in config.json: sizes from the files, the rest from the settings."""
        said = self._settings
        embedding, block = self._open(0)[0], self._open(2)[0]
        shapes = {_our_name(key): spec.shape for file in (embedding, block) for key, spec in file.specs.items()}
        try:
            rows, hidden = shapes["embed_in.weight"]
            intermediate = shapes["mlp.dense_h_to_4h.weight"][0] * self._ranks[2]
        except KeyError as error:
            raise UserError(f"{self.path} holds no {error.args[0]}; it is not a checkpoint of GPT-NeoX") from error
        if said.get("hidden_size", hidden) != hidden:
            raise UserError(f"{embedding.path} is {hidden} wide, {self._source} says {said['hidden_size']}")
        gelu = "gelu_fast" if said["bias_gelu_fusion"] else "gelu"
        return {
            "model_type": "gpt_neox",
            "vocab_size": rows * self._ranks[0],
            "hidden_size": hidden,
            "num_hidden_layers": said["num_layers"],
            "num_attention_heads": said.get("num_attention_heads"),
            "intermediate_size": intermediate,
            "max_position_embeddings": said["max_position_embeddings"],
            "rotary_pct": float(said["rotary_pct"]),
            "rotary_emb_base": float(said["rotary_emb_base"]),
            "hidden_act": gelu if said["activation"] == "gelu" else said["activation"],
            "layer_norm_eps": float(said["layernorm_epsilon"]),
            "use_parallel_residual": said["gpt_j_residual"],
            "attention_bias": "attention.query_key_value.bias" in shapes,
            "tie_word_embeddings": not said["no_weight_tying"],
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": END_OF_TEXT,
        }


def _file(layer: int, rank: int) -> str:
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def _our_name(key: str) -> str:
    module, _, kind = key.rpartition(".")
    return f"{_NAMES.get(module, module)}.{kind}"


def _ranks(folder: Path) -> dict[int, int]:
    """Return how many shards each layer has; UserError where they are not numbered from 0 without a gap."""
    found: dict[int, set[int]] = {}
    for entry in folder.iterdir():
        if match := _FILE.fullmatch(entry.name):
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    highest = max((max(ranks) for ranks in found.values()), default=-1)
    for layer, ranks in sorted(found.items()):
        if missing := sorted(set(range(max(ranks) + 1)) - ranks):
            raise UserError(f"{folder / _file(layer, missing[0])} is missing; shards up to {highest} are there")
    if not found:
        raise UserError(f"{folder} holds no files as {EXAMPLE}")
    return {layer: len(ranks) for layer, ranks in found.items()}


def _settings(folder: Path, last_layer: int) -> tuple[dict[str, Any], str]:
    """Return the network's settings, defaults filled in, and where they come from, for messages."""
    places = (folder / "configs", folder.parent / "configs")
    files = next((found for place in places if (found := sorted(place.glob("*.yml")))), [])
    said: dict[str, Any] = {}
    for file in files:
        for name, value in _read_yml(file).items():
            if said.setdefault(name, value) != value:
                raise UserError(f"{file} says {name}: {value}, another file beside it {said[name]}; keep this model's")
    source = str(files[0] if len(files) == 1 else files[0].parent) if files else "GPT-NeoX-20B's settings"
    if not files:
        if last_layer != _PUBLISHED["num_layers"] + 4:
            raise UserError(
                f"{places[1]}/*.yml is missing, and {folder} is not GPT-NeoX-20B; copy the yml files that the model "
                "was trained with there: they say the number of heads and the kind of residual"
            )
        said = dict(_PUBLISHED)
    settings = {**_DEFAULTS, **said}
    for name, value in _ONLY.items():
        if settings[name] != value:
            raise UserError(f"{source} says {name}: {settings[name]}; the kit reads only models with {name}: {value}")
    if not isinstance(settings.get("num_layers"), int):
        raise UserError(f"{source} does not say num_layers, a whole number")
    return settings, source


def _read_yml(path: Path) -> dict[str, Any]:
    """Return the settings of a yml file that matter here, hyphens as underscores."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no settings; fetch it again")
    known = _DEFAULTS.keys() | _PUBLISHED.keys()
    settings = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    return {name: value for name, value in settings.items() if name in known and value is not None}
