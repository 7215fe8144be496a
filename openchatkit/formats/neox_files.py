"""The files of one step of GPT-NeoX: each rank's part of each layer, whichever of its two kinds of files it is in."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import neox_layout
from openchatkit.formats.neox_layout import EXAMPLE, LAYER_FILE, WHOLE_FILE
from openchatkit.formats.pickled import PickledFile


class StepFiles(Protocol):
    """The files of a step: `ranks`, how many have a part of each layer, and the layers of each."""

    ranks: dict[int, int]

    def name(self, layer: int, rank: int) -> str:
        """Return the name of the file with a rank's part of a layer."""

    def place(self, layer: int) -> str:
        """Return where in its file a layer is, for messages."""

    def open(self, layer: int, rank: int) -> "LayerPart":
        """Open a rank's part of a layer."""


class LayerPart:
    """A rank's part of a layer: `specs` by GPT-NeoX's names of tensors, of a file at `path`."""

    def __init__(self, file: PickledFile, prefix: str = "") -> None:
        self.path, self._file, self._prefix = file.path, file, prefix
        self.specs = {key.removeprefix(prefix): spec for key, spec in file.specs.items() if key.startswith(prefix)}

    def read(self, key: str) -> Tensor:
        """Return a tensor, memory-mapped."""
        return self._file.read([self._prefix + key])[self._prefix + key]


class _LayerFiles:
    """A file for each layer and rank, as pipelines write them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found: dict[int, set[int]] = {}
        for entry in folder.iterdir():
            if match := LAYER_FILE.fullmatch(entry.name):
                found.setdefault(int(match[1]), set()).add(int(match[2]))
        highest = max((max(ranks) for ranks in found.values()), default=-1)
        for layer, ranks in sorted(found.items()):
            if missing := sorted(set(range(max(ranks) + 1)) - ranks):
                raise UserError(f"{folder / self.name(layer, missing[0])} is missing; shards up to {highest} are there")
        self.ranks = {layer: len(ranks) for layer, ranks in found.items()}

    def name(self, layer: int, rank: int) -> str:
        return neox_layout.layer_file(layer, rank)

    def place(self, layer: int) -> str:
        return ""

    def open(self, layer: int, rank: int) -> LayerPart:
        return LayerPart(PickledFile(self._folder / self.name(layer, rank)))


class _WholeFiles:
    """A file for each rank, as models without a pipeline are saved."""

    def __init__(self, folder: Path) -> None:
        numbers = sorted(int(match[1]) for entry in folder.iterdir() if (match := WHOLE_FILE.fullmatch(entry.name)))
        if missing := sorted(set(range(numbers[-1] + 1)) - set(numbers)):
            raise UserError(f"{folder / neox_layout.whole_file(missing[0])} is missing; {numbers[-1]} is there")
        self._files = [PickledFile(folder / neox_layout.whole_file(n), entry=neox_layout.TENSORS) for n in numbers]
        self.ranks: dict[int, int] = {}
        for file in self._files:
            if file.specs.keys() != self._files[0].specs.keys():
                raise UserError(f"{file.path} and {self._files[0].path.name} hold different tensors; fetch both again")
        for key in self._files[0].specs:
            match = neox_layout.IN_WHOLE_FILE.fullmatch(key)
            if match is None:
                raise UserError(f"{self._files[0].path} holds {key}; expected tensors such as sequential.0.x.weight")
            self.ranks[int(match[1])] = len(self._files)

    def name(self, layer: int, rank: int) -> str:
        return neox_layout.whole_file(rank)

    def place(self, layer: int) -> str:
        return f": {neox_layout.in_whole_file(layer, '*')}"

    def open(self, layer: int, rank: int) -> LayerPart:
        return LayerPart(self._files[rank], neox_layout.in_whole_file(layer, ""))


def open_files(folder: Path) -> StepFiles:
    """Open the files of a step's folder; UserError where they are not numbered without a gap, or hold no weights."""
    layers = _LayerFiles(folder)
    if layers.ranks:
        return layers
    if neox_layout.is_checkpoint(folder):
        whole = _WholeFiles(folder)
        if whole.ranks:
            return whole
        raise UserError(
            f"{folder} holds the state of ranks and no weights: its files such as {EXAMPLE} are missing; fetch them"
        )
    raise UserError(f"{folder} holds no files as {EXAMPLE}")
