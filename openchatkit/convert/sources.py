"""Checkpoints as a stream of Hugging Face tensors: ours, and the original kit's pipeline stages."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.convert.streams import digest
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, hf_model
from openchatkit.formats.checkpoint import StageCheckpoint
from openchatkit.formats.layer_shards import check_shard, read_config
from openchatkit.formats.tensor_file import TensorSpec
from openchatkit.formats.tokenizer_files import check_tokenizer, has_tokenizer
from openchatkit.models.config import ModelConfig
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, shard_names


@dataclass(frozen=True)
class StageFlags:
    """Values of the flags on pipeline stages; None where they are left out."""

    stages: int | None = None
    layers_per_stage: int | None = None


class TensorSource:
    """A model to convert: `raw_config`, `config`, `tokenizer` (a folder), and `specs`, its tensors by their keys."""

    def __init__(self, raw_config: dict[str, Any], config: ModelConfig, tokenizer: Path) -> None:
        self.raw_config, self.config, self.tokenizer = raw_config, config, tokenizer
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[str, str]] = {}

    def chunks(self, key: str) -> Iterator[memoryview]:
        """Yield one tensor's bytes in pieces; each is valid until the next is taken."""
        raise NotImplementedError

    def _add(self, where: Path, shard: str, specs: dict[str, TensorSpec]) -> None:
        check_shard(where, self.config, shard, specs)
        for name, spec in specs.items():
            key = family(self.config).hf_key(shard, name)
            self.specs[key], self._places[key] = spec, (shard, name)


class CheckpointSource(TensorSource):
    """One of our checkpoints, or a prepared model. Each file is compared with the manifest before a tensor is read."""

    def __init__(self, path: Path, *, config_name: str | None, flags: StageFlags) -> None:
        checkpoint.verify(path, [])
        trained = checkpoint.STATE in checkpoint.read_manifest(path).files
        _check_flags(path, checkpoint.read_state(path).get("layout", {}) if trained else {}, flags)
        raw_config, config = read_config(path)
        super().__init__(raw_config, config, _find_tokenizer(path, config, config_name))
        self._path = path
        self._files = {shard: checkpoint.open_weights(path, shard) for shard in shard_names(config.num_layers)}
        self._pool = ThreadPoolExecutor(2)
        self._checks: dict[str, Future[None]] = {}
        for shard, file in self._files.items():
            self._add(file.path, shard, file.specs)

    def chunks(self, key: str) -> Iterator[memoryview]:
        shard, name = self._places[key]
        self._check_ahead(shard)
        self._checks[shard].result()
        return self._files[shard].chunks(name)

    def _check_ahead(self, shard: str) -> None:
        """Hash a shard and the next two while others are written; more might leave the cache before their turn."""
        shards = list(self._files)
        for near in shards[shards.index(shard) :][:3]:
            if near not in self._checks:
                self._checks[near] = self._pool.submit(checkpoint.verify_weights, self._path, near)


class LegacySource(TensorSource):
    """A checkpoint of the original kit, whose config and tokenizer are those of the base model."""

    def __init__(self, path: Path, *, config_name: str, stages: int, layers_per_stage: int) -> None:
        base = hf_model.fetch(config_name, weights=False)
        super().__init__(*read_config(base), base)
        _require_tokenizer(base, self.config)
        self._stages = StageCheckpoint(path, self.config, stages=stages, layers_per_stage=layers_per_stage)
        self._check_tied(path)
        for shard in shard_names(self.config.num_layers):
            file, keys = self._stages.file(shard), self._stages.keys(shard)
            self._add(file.path, shard, {name: file.specs[key] for name, key in keys.items()})

    def chunks(self, key: str) -> Iterator[memoryview]:
        shard, name = self._places[key]
        return self._stages.file(shard).chunks(self._stages.keys(shard)[name])

    def _check_tied(self, path: Path) -> None:
        if keys := self._stages.untied():
            embedding, projection = (self._stages.file(s).chunks(k) for s, k in zip((EMBED, HEAD), keys, strict=True))
            if digest(embedding) != digest(projection):
                raise UserError(
                    f"{path}: the config ties the embeddings, but the first and the last stage hold different ones; "
                    "pass a --config-name whose tie_word_embeddings is false"
                )


def _check_flags(path: Path, recorded: dict[str, Any], given: StageFlags) -> None:
    """Raise UserError when stage flags are given and differ from what the checkpoint records."""
    for flag, name, value in (
        ("--n-stages", "stages", given.stages),
        ("--n-layer-per-stage", "layers_per_stage", given.layers_per_stage),
    ):
        if value is not None and value != recorded.get(name, value):
            raise UserError(f"{path} was written by {recorded[name]} {name}, {flag} says {value}; leave the flag out")


def _find_tokenizer(path: Path, config: ModelConfig, config_name: str | None) -> Path:
    """Return the folder with the tokenizer of one of our checkpoints: itself, or that of the model `config_name`."""
    if config_name and (not has_tokenizer(path) or Path(config_name).is_dir()):
        base = hf_model.fetch(config_name, weights=False)
        if (stated := read_config(base)[1]) != config:
            different = [name for name, value in vars(stated).items() if value != getattr(config, name)]
            raise UserError(
                f"--config-name {config_name}: its {different[0]} is not that of {path}; leave the flag out"
            )
        path = path if has_tokenizer(path) else base
    _require_tokenizer(path, config)
    return path


def _require_tokenizer(folder: Path, config: ModelConfig) -> None:
    if not has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer: pass --config-name with the base model's name or folder")
    check_tokenizer(folder, config.vocab_size)
