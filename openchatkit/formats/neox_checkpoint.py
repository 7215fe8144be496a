"""Checkpoints of GPT-NeoX, read: of any number of tensor ranks, with a pipeline or without, of 2021 and of today.

    20B_tokenizer.json  latest  configs/*.yml  global_step150000/layer_<ii>-model_<rr>-model_states.pt

That is how GPT-NeoX-20B was published; `neox_layout` has all names. The parts of tensor ranks are merged as GPT-NeoX's
layers add them up. `neox_writer` writes such folders.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import neox_layout, neox_settings, neox_tokenizers, tokenizer_files
from openchatkit.formats.neox_files import LayerPart, open_files
from openchatkit.formats.neox_saved_settings import SavedSettings
from openchatkit.formats.neox_tokenizers import NeoxTokenizer
from openchatkit.formats.tensor_file import TensorSpec
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import is_cut, join_tensor, whole_shape
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import shard_names
from openchatkit.models.sparsity import read_sparsity

END_OF_TEXT = 0
EXAMPLE = neox_layout.EXAMPLE


def tokenizer_file(path: Path) -> Path | None:
    """Return the tokenizer published with GPT-NeoX-20B, in a folder or beside it; None where there is none."""
    places = (folder / "20B_tokenizer.json" for folder in (path, path.parent))
    return next((place for place in places if place.is_file()), None)


class NeoXCheckpoint:
    """A checkpoint with the interface of LayerShards: `path`, `raw_config`, `config`, `shards` and `read`.

    `path` is the folder of a step. UserError when files are missing, do not belong together, or describe a network that
    the kit does not support.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._files = open_files(self.path)
        self.settings = SavedSettings(self.path, blocks=max(self._files.ranks) - 4)
        self._source = self.settings.source
        self._count, self._tied = self.settings.need("num_layers")[0], not self.settings.get("no_weight_tying")
        self._check_files(sorted(self._files.ranks))
        self.raw_config = self._describe()
        try:
            self.config: ModelConfig = config_from_hf(self.raw_config)
        except UserError as error:
            raise UserError(f"{self._source}, read as {error}") from error
        self.shards = shard_names(self.config.num_layers)
        self._check_norms()

    def read(self, shard: str) -> dict[str, Tensor]:
        """Read a shard's tensors, merged, on the CPU, in the dtype they are stored in; memory-mapped where not cut."""
        merged: dict[str, Tensor] = {}
        layers = neox_layout.shard_layers(self.config, shard)
        expected = family(self.config).parameter_shapes(self.config, shard)
        for layer in layers:
            self._check_cuts(layer, expected)
            merged |= self._read_layer(layer)
        if self.settings.get("gpt_j_residual") and self.settings.get("gpt_j_tied"):
            # The norm that attention and MLP share is the first; the second is stored too.
            merged = {name: t for name, t in merged.items() if not name.startswith("post_attention_layernorm.")}
        where = self.path / self._files.name(layers[0], 0)
        if different := sorted(expected.keys() ^ merged.keys()):
            has = "lacks" if different[0] in expected else "holds"
            raise UserError(f"{where} {has} {different[0]}, unlike the network that {self._source} describes")
        for name, shape in expected.items():
            self._check_shape(where, name, tuple(merged[name].shape), shape)
        return {name: merged[name] for name in expected}

    def _open(self, layer: int) -> list[LayerPart]:
        """Open a layer's files, rank after rank; UserError unless they hold the same names in the same shapes."""
        files = [self._files.open(layer, rank) for rank in range(self._files.ranks.get(layer, 0))]
        for file in files[1:]:
            if file.specs != files[0].specs:
                raise UserError(f"{file.path} and {files[0].path.name} hold different tensors; fetch both again")
        return files

    def _check_cuts(self, layer: int, expected: Mapping[str, tuple[int, ...]]) -> None:
        """UserError unless the parts of tensors, which are merged by the settings, are of their sizes."""
        cuts, ranks = family(self.config).cuts(self.config), self._files.ranks.get(layer, 0)
        if not ranks:  # of a norm without parameters
            return
        part = self._files.open(layer, 0)
        for key, spec in part.specs.items():
            name = neox_layout.our_name(key)
            if name is not None and name in expected and is_cut(cuts[name]) and len(spec.shape) == len(expected[name]):
                self._check_shape(part.path, name, whole_shape(spec.shape, cuts[name], ranks), expected[name])

    def _check_shape(self, path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise UserError(f"{path}: {name} is {list(found)}, {self._source} makes it {list(expected)}")

    def _read_layer(self, layer: int) -> dict[str, Tensor]:
        files = self._open(layer)
        if not files:  # of a norm without parameters
            return {}
        names = {key: ours for key in files[0].specs if (ours := neox_layout.our_name(key)) is not None}
        return {ours: self._merge(ours, [file.read(key) for file in files]) for key, ours in names.items()}

    def _merge(self, name: str, parts: list[Tensor]) -> Tensor:
        """Merge the shards of one tensor, one of each rank; GPT-NeoX stores on all ranks what it does not cut."""
        if name.startswith(neox_layout.QK_NORM):
            parts = [part.flatten() for part in parts]  # [heads, head_dim] there
        cut = family(self.config).cuts(self.config).get(name, "rows")  # `read` refuses names of no parameter
        if is_cut(cut) or len(parts) == 1:
            return join_tensor(parts, cut)
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        if name in neox_layout.ADDED_BIASES:
            # With parallel residual every rank adds its own before the ranks' results are summed, else all have one.
            summed = torch.stack(parts).to(wide).sum(0).to(parts[0].dtype)
            return summed if self.settings.get("gpt_j_residual") else parts[0]
        if all(torch.equal(part, parts[0]) for part in parts[1:]):
            return parts[0]
        return torch.stack(parts).to(wide).mean(0).to(parts[0].dtype)  # copies, which drift apart in training

    def _check_files(self, layers: list[int]) -> None:
        """UserError unless every layer is there, on as many ranks as the tensors were cut for."""
        files, said = self._files, f"{self._source} says {self._count} layers"
        expected = neox_layout.list_layers(self._count, tied=self._tied)
        norm = {self._count + 3} if self.settings.get("norm") == "non_parametric_layernorm" else set()
        if left := sorted(set(layers) - set(expected)):
            raise UserError(f"{self.path / files.name(left[-1], 0)}{files.place(left[-1])} is one too many; {said}")
        if missing := sorted(set(expected) - set(layers) - norm):
            raise UserError(f"{self.path / files.name(missing[0], 0)}{files.place(missing[0])} is missing; {said}")
        ranks = files.ranks[layers[0]]
        if other := [layer for layer in layers if files.ranks[layer] != ranks]:
            raise UserError(
                f"{self.path} holds {ranks} shards of layer {layers[0]} and {files.ranks[other[0]]} of layer "
                f"{other[0]}; fetch what is missing, or keep one checkpoint alone in the folder"
            )
        columns = self._find_shape(2, "attention.dense.weight", "it is not a layer of GPT-NeoX")
        if columns[1] * ranks != columns[0]:
            raise UserError(
                f"{self.path} holds {ranks} shards a layer, its tensors were cut into {columns[0] / columns[1]:g}; "
                "fetch what is missing, or keep one checkpoint alone in the folder"
            )

    def _check_norms(self) -> None:
        ranks, norm = self._files.ranks[0], self.config.options.norm
        if self.config.options.use_qk_layernorm and ranks > 1 and norm in ("layernorm", "non_parametric_layernorm"):
            raise UserError(
                f"{self._source}: use_qk_layernorm with {norm} is over the heads of one of {ranks} tensor ranks, which "
                "no other number of them computes: the checkpoint cannot be merged"
            )

    def _describe(self) -> dict[str, Any]:
        """Return config.json: sizes from the files, the rest from the settings."""
        no_model = "it is not a checkpoint of GPT-NeoX"
        rows, hidden = self._find_shape(0, "embed_in.weight", no_model)
        inner = self._find_shape(2, "mlp.dense_4h_to_h.weight", no_model)[1] * self._files.ranks[2]
        said = self.settings.need("hidden_size")[0]
        if said != hidden:
            raise UserError(f"{self.path / self._files.name(0, 0)} is {hidden} wide, {self._source} says {said}")
        raw = neox_settings.describe_model(self.settings, rows=rows * self._files.ranks[0], inner_width=inner)
        for kind in {*raw.get("attention_config", ())} - {"global"}:
            if read_sparsity(raw["sparsity_config"]).count_random_blocks(kind):
                raise UserError(
                    f"{self.settings.where('attention_config')}: GPT-NeoX draws the random blocks of {kind} again in "
                    "each run, and stores them nowhere: nothing can compute this model again"
                )
        end = self._find_end_of_text()
        return raw | {"bos_token_id": end, "eos_token_id": end}

    def _find_shape(self, layer: int, name: str, otherwise: str) -> tuple[int, int]:
        """Return the shape of a rank's part of a matrix; UserError where a layer has none of that name."""
        file = self._files.open(layer, 0)
        for key, spec in file.specs.items():
            if neox_layout.our_name(key) == name and len(spec.shape) == 2:
                return spec.shape[0], spec.shape[1]
        found = ", ".join(sorted(key for key, spec in file.specs.items() if len(spec.shape) == 2)) or "no matrix"
        raise UserError(f"{file.path} holds no {name} (it holds {found}); {otherwise}")

    def verify(self, shards: Iterable[str] | None = None) -> None:
        """Read the headers of the files of `shards` (default: of all): GPT-NeoX keeps no digests to compare with."""
        for shard in self.shards if shards is None else shards:
            for layer in neox_layout.shard_layers(self.config, shard):
                self._open(layer)

    def list_files(self) -> list[Path]:
        """Return the files that hold the tensors."""
        return sorted({self.path / self._files.name(layer, rank) for layer, rank in self._list_parts()})

    def list_specs(self) -> Iterator[TensorSpec]:
        """Yield dtype and shape of every rank's part of every tensor."""
        for layer, rank in self._list_parts():
            yield from self._files.open(layer, rank).specs.values()

    def write_tokenizer(self, folder: Path) -> bool:
        """Write the tokenizer that lies here, or that the settings name, as AutoTokenizer loads it; return if it did.

        UserError where it is of no kind that can be written, or asks for remote code.
        """
        if place := next((each for each in (self.path, self.path.parent) if tokenizer_files.has_tokenizer(each)), None):
            tokenizer_files.copy_tokenizer(place, folder)
            return True
        tokenizer = self._load_tokenizer()
        if tokenizer is not None:
            neox_tokenizers.write(tokenizer, folder)
        return tokenizer is not None

    def _list_parts(self) -> list[tuple[int, int]]:
        return [(layer, rank) for layer, ranks in sorted(self._files.ranks.items()) for rank in range(ranks)]

    def _load_tokenizer(self) -> NeoxTokenizer | None:
        if loaded := self.settings.load_tokenizer():
            return loaded
        file = tokenizer_file(self.path)
        return None if file is None else neox_tokenizers.load("HFTokenizer", file, None)

    def _find_end_of_text(self) -> int:
        # That a tokenizer cannot be loaded is said when it is needed.
        with contextlib.suppress(UserError):
            if (tokenizer := self._load_tokenizer()) is not None and tokenizer.end_of_text is not None:
                return tokenizer.end_of_text
        return END_OF_TEXT
