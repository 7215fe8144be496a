"""Layer shards: a prepared model as one file a layer, beside its config.json and its tokenizer.

    embed.safetensors  layer_00000.safetensors ...  head.safetensors  config.json  tokenizer files  manifest.json

The manifest is written last and makes the folder whole. Until then `prepare.json` takes its place
and lists the finished shards. The original kit's pickled shards (no manifest) are read where there are no others.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import config_file, legacy, manifest, neox_layout
from openchatkit.formats.manifest import Manifest, advise
from openchatkit.formats.pickled import PickledFile
from openchatkit.formats.tensor_file import TensorFile, TensorSpec
from openchatkit.formats.tokenizer_files import has_tokenizer
from openchatkit.models.config import ModelConfig
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import shard_names

CONFIG = config_file.CONFIG
JOURNAL = "prepare.json"
_AGAIN = "run the same prepare command again, it writes only what is missing"


def shard_file(shard: str) -> str:
    """Return the name of the file with a shard's weights, in prepared folders and in checkpoints."""
    return f"{shard}.safetensors"


def folder_name(model_name: str) -> str:
    """Return the prepared folder's name: `<org>_<model>` for a hub name, the last component for any other path."""
    hub = re.fullmatch(r"([\w-][\w.-]*)/([\w.-]+)", model_name)
    return f"{hub[1]}_{hub[2]}" if hub else Path(model_name).resolve().name


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Read config.json as it is and as the models use it; UserError also when it asks for remote code."""
    raw = config_file.read_raw(folder)
    return raw, config_from_hf(raw)


def check_shard(where: Path, config: ModelConfig, shard: str, found: dict[str, TensorSpec]) -> None:
    """UserError unless `found` holds exactly the shard's parameters in their shapes."""
    expected = family(config).parameter_shapes(config, shard)
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"{where}: {shard} lacks {missing[0]}; expected {len(expected)} tensors, found {len(found)}")
    if left := sorted(found.keys() - expected.keys()):
        raise UserError(
            f"{where}: {shard} holds {left[0]}, which a {config.family} model of this config.json does not have"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{where}: {name} of {shard} is {list(found[name].shape)}, config.json says {list(shape)}")


class LayerShards:
    """A prepared model: `path`, `config`, `raw_config`, and `shards`, their names in the order of the data's flow."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.raw_config, self.config = read_config(self.path)
        self.shards = shard_names(self.config.num_layers)
        self._manifest: Manifest | None = None

    @classmethod
    def open(cls, path: Path, *, weights: bool = True) -> "LayerShards":
        """Open a prepared folder; UserError unless config.json fits and every shard is there in its full size.

        Without `weights`, which start at random, a folder with config.json is enough.
        """
        path = Path(path)
        if not weights and (path / CONFIG).is_file():
            return cls(path)
        if (path / JOURNAL).is_file():
            raise UserError(f"{path}: preparing this model was not finished; {_AGAIN}")
        if not (path / CONFIG).is_file():
            if neox_layout.list_steps(path):
                raise UserError(
                    f"{path} is a checkpoint of GPT-NeoX: run `python tools/convert_from_neox.py {path} --save-dir "
                    "MODEL` and pass MODEL"
                )
            raise UserError(f"{path} is not a prepared model: {_describe(path)}; {_hint()}")
        opened = cls(path)
        if not opened._is_legacy():
            with advise(_AGAIN):
                opened._manifest = manifest.read(path)
                manifest.check_sizes(path, opened._manifest)
                manifest.check_sizes(path, opened._manifest, map(shard_file, opened.shards))
        return opened

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer."""
        return has_tokenizer(self.path)

    def verify(self, shards: Iterable[str] | None = None) -> None:
        """Compare the bytes of `shards` (default: of every file) with the manifest; the original's shards have none."""
        if self._manifest:
            with advise(_AGAIN):
                manifest.verify(self.path, shards and map(shard_file, shards), manifest=self._manifest)

    def read(self, shard: str, *, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Read a shard's tensors (or those in `names`), memory-mapped, on the CPU, in the dtype they are stored in."""
        file: TensorFile | PickledFile
        if self._manifest:
            file = TensorFile(self.path / shard_file(shard))
            found = list(file.specs)
        else:
            file = PickledFile(self.path / legacy.shard_file(shard))
            found = legacy.parameter_names(self.config, shard, file.specs)
        check_shard(file.path, self.config, shard, {name: file.specs[name] for name in found})
        return file.read(found if names is None else names)

    def _is_legacy(self) -> bool:
        """Return whether this is a folder of the original kit; UserError for no prepared model, or missing shards."""
        if (self.path / manifest.MANIFEST).is_file():
            return False
        names = [legacy.shard_file(shard) for shard in self.shards]
        missing = [name for name in names if not (self.path / name).is_file()]
        if len(missing) == len(names):
            raise UserError(f"{self.path} is not a prepared model: {_describe(self.path)}; {_hint(self.path)}")
        if missing:
            raise UserError(f"{self.path / missing[0]} is missing; {len(missing)} of {len(names)} shards are")
        return True


def _describe(path: Path) -> str:
    """Describe what a folder holds instead of a prepared model."""
    if not path.is_dir():
        return "no such folder" if not path.exists() else "it is a file"
    names = sorted(entry.name for entry in path.iterdir())
    return f"found {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "the folder is empty"


def _hint(model: Path | str = "MODEL") -> str:
    return f"run `python pretrained/GPT-NeoX-20B/prepare.py --model-name {model}` and pass the folder it names"
