"""A whole `Stage` from any folder: layer shards, a training checkpoint, a Hugging Face or a GPT-NeoX model.

Owns which of these a folder is, and filling the network one layer at a time; nothing is converted on the way. Stages
that are a part of a model, to be trained, are filled by `training.checkpoints`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, neox_layout, tokenizer_files
from openchatkit.formats.hf_model import HFModel
from openchatkit.formats.layer_shards import LayerShards, check_shard, read_config
from openchatkit.formats.neox_checkpoint import NeoXCheckpoint
from openchatkit.loading import pretrained
from openchatkit.loading.model_kinds import CHECKPOINT, GPT_NEOX, HUGGING_FACE, ModelFolder
from openchatkit.models.config import ModelConfig
from openchatkit.models.family import SkipInit
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, shard_names
from openchatkit.models.stage import Stage

PreparedModel = LayerShards | NeoXCheckpoint


class ShardReader(Protocol):
    """A model's weights shard by shard: its `config`, also as config.json says it, and the names of its shards."""

    raw_config: dict[str, Any]
    config: ModelConfig
    shards: list[str]

    def read(self, shard: str) -> Mapping[str, Tensor]:
        """Return a shard's tensors by their names in the shard, on the CPU, as they are stored."""


def count_parameters(found: ModelFolder) -> int:
    """Return the number of a model's parameters by its configuration, without a look at its weights."""
    if found.kind == HUGGING_FACE:
        return pretrained.count_parameters(found.path)
    config = NeoXCheckpoint(found.path).config if found.kind == GPT_NEOX else read_config(found.path)[1]
    return sum(parameter.numel() for parameter in _empty_stage(config).parameters())


def open_shards(found: ModelFolder, *, verify: bool = True) -> ShardReader:
    """Open a model's weights; with `verify`, compare its files with their manifest if it has one."""
    if found.kind == GPT_NEOX:
        return NeoXCheckpoint(found.path)
    if found.kind == HUGGING_FACE:
        return _HFReader(found.path)
    if found.kind == CHECKPOINT:
        reader = _CheckpointReader(found.path)
        if verify:
            checkpoint.verify(found.path, reader.shards)
        return reader
    shards = LayerShards.open(found.path)
    if verify:
        shards.verify()
    return shards


def open_prepared(path: Path, *, weights: bool = True) -> PreparedModel:
    """Open the model that training starts from: layer shards, or a checkpoint of GPT-NeoX, read as it is.

    Without `weights`, which start at random, a folder with config.json is enough. UserError for any other.
    """
    step = neox_layout.find(path) if weights else None
    return LayerShards.open(path, weights=weights) if step is None else NeoXCheckpoint(step)


def shard_keys(model: HFModel) -> dict[str, dict[str, str]]:
    """Map a Hugging Face model to shards: {shard: {name in the shard: Hugging Face key}}, in the order of the files.

    UserError for a tensor that the network of its config.json does not have, or has under another key too.
    """
    kind = family(model.config)
    keys: dict[str, dict[str, str]] = {shard: {} for shard in shard_names(model.config.num_layers)}
    for key in model.specs:
        try:
            place = kind.from_hf_key(key)
        except KeyError:
            place = ("", key)
        if place is None:
            continue
        shard, name = place
        if shard not in keys or name in keys[shard]:
            raise UserError(
                f"{model.path} holds {key}, for which a {kind.name} model of {len(keys) - 2} layers has no place; "
                "is config.json this model's?"
            )
        keys[shard][name] = key
    return keys


def write_tokenizer(found: ModelFolder, folder: Path) -> None:
    """Write the tokenizer of a model's folder, or that GPT-NeoX's settings name, so that AutoTokenizer loads it.

    UserError where there is none.
    """
    if found.kind == GPT_NEOX:
        if NeoXCheckpoint(found.path).write_tokenizer(folder):
            return
    elif tokenizer_files.has_tokenizer(found.path):
        tokenizer_files.copy_tokenizer(found.path, folder)
        return
    advice = f"put {tokenizer_files.tokenizer_json(found.path).name}, as its training used it, there"
    raise UserError(f"{found.path} holds no tokenizer: {advice}")


def load_stage(reader: ShardReader, device: torch.device, dtype: torch.dtype | None = None) -> Stage:
    """Load the whole network for inference, a layer at a time, in `dtype` or as it is stored.

    Tensors that need not be converted or moved stay memory-mapped.
    """
    stage, kind = _empty_stage(reader.config), family(reader.config)
    embedding: Tensor | None = None
    with progress.bar(len(reader.shards), "Loading", unit="shard") as bar:
        for shard in reader.shards:
            tensors = {name: tensor.to(device, dtype) for name, tensor in reader.read(shard).items()}
            if shard == EMBED:
                embedding = tensors[kind.embedding_weight]
            if shard == HEAD and reader.config.tie_embeddings:
                assert embedding is not None, reader.shards
                tensors[kind.tied_weight] = embedding
            stage.load(shard, tensors)
            bar.update()
    return stage.eval().requires_grad_(False)


def _empty_stage(config: ModelConfig) -> Stage:
    with torch.device("meta"), SkipInit():
        return Stage(config)


class _CheckpointReader:
    """The `ShardReader` of a training checkpoint."""

    def __init__(self, path: Path) -> None:
        self.raw_config, self.config = read_config(path)
        self.shards = shard_names(self.config.num_layers)
        self._path = path

    def read(self, shard: str) -> Mapping[str, Tensor]:
        return checkpoint.read_weights(self._path, shard)


class _HFReader:
    """The `ShardReader` of a Hugging Face model of a family that the kit trains."""

    def __init__(self, path: Path) -> None:
        self._model = HFModel(path)
        self.raw_config, self.config = self._model.raw_config, self._model.config
        self.shards = shard_names(self.config.num_layers)
        self._keys = shard_keys(self._model)
        if self.config.tie_embeddings:
            self._keys[HEAD].pop(family(self.config).tied_weight, None)

    def read(self, shard: str) -> Mapping[str, Tensor]:
        keys = self._keys[shard]
        specs = {name: self._model.specs[key] for name, key in keys.items()}
        check_shard(self._model.path, self.config, shard, specs)
        return {name: self._model.read(key) for name, key in keys.items()}
