"""The command `tools/inspect_checkpoint.py`: what the tensors of a model are, and where two models differ.

Models of all kinds of folders have the same names here, Hugging Face's, so that any two can be compared: a checkpoint
with the model it was converted to, for example. One shard of a model is in memory at a time.
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from openchatkit import cli
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from openchatkit.loading.model_kinds import ModelFolder

_CHUNK = 1 << 22  # numbers that are widened at a time


class TensorGroups(Protocol):
    """A model's tensors in groups of what is read together, by the names of groups."""

    groups: list[str]

    def read(self, group: str) -> "dict[str, Tensor]":
        """Return a group's tensors by Hugging Face's keys."""


@dataclass(frozen=True)
class TensorStatistics:
    """Of a tensor's finite numbers the Euclidean norm, the least and the greatest; how many are NaN or infinite."""

    norm: float
    least: float
    greatest: float
    nan: int
    infinite: int


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a tensor and one for all; return 1 where two models differ."""
    parser = cli.Parser(
        prog="tools/inspect_checkpoint.py", description="Show the tensors of a model, or where two models differ."
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a training checkpoint, layer shards, a Hugging Face model, or a checkpoint of GPT-NeoX",
    )
    parser.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="a model to compare with")
    parser.add_argument("--only", default="*", help="keys of tensors to look at: *.attention.*")
    parser.add_argument(
        "--tolerance", type=cli.non_negative_float, default=0.0, help="differences up to this are none, with OTHER"
    )
    args = parser.parse_args(argv)
    if args.other is None:
        inspect(args.path, only=args.only)
        return 0
    return 0 if compare(args.path, args.other, only=args.only, tolerance=args.tolerance) else 1


def inspect(path: Path, *, only: str = "*") -> None:
    """Print dtype, shape and statistics of each tensor whose key is like `only`, and of all of them."""
    model = open_model(path)
    print(f"{'norm':>12} {'least':>12} {'greatest':>12} {'NaN':>5} {'inf':>5}  {'dtype':9} key and shape")
    found: list[TensorStatistics] = []
    numbers = size = 0
    for key, tensor in _read_all(model, only):
        one = measure(tensor)
        found.append(one)
        numbers, size = numbers + tensor.numel(), size + tensor.nbytes
        print(
            f"{one.norm:12.5g} {one.least:12.5g} {one.greatest:12.5g} {one.nan:5} {one.infinite:5}  "
            f"{_name(tensor):9} {key} {list(tensor.shape)}"
        )
    if not found:
        raise UserError(f"{path} holds no tensor like {only}")
    norm = math.sqrt(sum(one.norm**2 for one in found))
    nan, infinite = sum(one.nan for one in found), sum(one.infinite for one in found)
    print(f"{len(found)} tensors, {numbers:,} numbers, {size:,} bytes, norm {norm:.5g}, {nan} NaN, {infinite} infinite")


def compare(path: Path, other: Path, *, only: str = "*", tolerance: float = 0.0) -> bool:
    """Print each tensor that is in one model alone or differs by more than `tolerance`; return whether none does.

    NaN equals NaN here, and dtypes may differ.
    """
    first, second = open_model(path), open_model(other)
    places = {group: None for group in (*first.groups, *second.groups)}
    looked = differing = 0
    for group in places:
        ours, theirs = (_read_group(model, group, only) for model in (first, second))
        for key in {**ours, **theirs}:
            looked += 1
            if difference := _find_difference(ours.get(key), theirs.get(key), path, other, tolerance):
                differing += 1
                print(f"{key}: {difference}")
    if not looked:
        raise UserError(f"neither {path} nor {other} holds a tensor like {only}")
    print(f"{differing} of {looked} tensors differ" if differing else f"{looked} tensors, none of which differs")
    return not differing


def open_model(path: Path) -> TensorGroups:
    """Open the model that a path means; UserError where there is none."""
    from openchatkit.formats import config_file
    from openchatkit.loading import model_kinds
    from openchatkit.models.registry import FAMILIES

    found = model_kinds.find(path.expanduser())
    if found.kind == model_kinds.HUGGING_FACE and config_file.read_raw(found.path).get("model_type") not in FAMILIES:
        return _HFGroups(found.path)
    return _ShardGroups(found)


class _ShardGroups:
    """The shards of a model of a family that the kit knows."""

    def __init__(self, found: "ModelFolder") -> None:
        from openchatkit.loading import stages
        from openchatkit.models.registry import family

        self._reader = stages.open_shards(found, verify=False)
        self._family = family(self._reader.config)
        self.groups = self._reader.shards

    def read(self, group: str) -> "dict[str, Tensor]":
        return {self._family.hf_key(group, name): tensor for name, tensor in self._reader.read(group).items()}


class _HFGroups:
    """The tensors of any other model of Hugging Face's, one a group."""

    def __init__(self, path: Path) -> None:
        from openchatkit.formats.hf_model import HFTensors

        self._model = HFTensors(path)
        self.groups = list(self._model.specs)

    def read(self, group: str) -> "dict[str, Tensor]":
        return {group: self._model.read(group)}


def measure(tensor: "Tensor") -> TensorStatistics:
    """Compute the statistics of a tensor in float64, piece by piece."""
    square, nan, infinite = 0.0, 0, 0
    least, greatest = math.inf, -math.inf
    for piece in _widen(tensor):
        finite = piece[piece.isfinite()]
        nan += int(piece.isnan().sum())
        infinite += int(piece.isinf().sum())
        if finite.numel():
            square += float(finite.square().sum())
            least, greatest = min(least, float(finite.min())), max(greatest, float(finite.max()))
    return TensorStatistics(math.sqrt(square), least, greatest, nan, infinite)


def find_largest_difference(a: "Tensor", b: "Tensor") -> float:
    """Return the largest absolute difference of two tensors of one shape; infinite where one of two is not finite."""
    import torch

    largest = 0.0
    for one, two in zip(_widen(a), _widen(b), strict=True):
        same = (one == two) | (one.isnan() & two.isnan())
        apart = torch.where(same, 0.0, (one - two).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, float(apart.max()) if apart.numel() else 0.0)
    return largest


def _find_difference(
    ours: "Tensor | None", theirs: "Tensor | None", path: Path, other: Path, tolerance: float
) -> str | None:
    """Return in words how two tensors differ, None where they do not."""
    if ours is None or theirs is None:
        return f"in {other if ours is None else path} alone"
    if ours.shape != theirs.shape:
        return f"{list(ours.shape)} and {list(theirs.shape)}"
    apart = find_largest_difference(ours, theirs)
    if apart <= tolerance:
        return None
    dtypes = f" ({_name(ours)} and {_name(theirs)})" if ours.dtype != theirs.dtype else ""
    return f"differs by up to {apart:.5g}{dtypes}"


def _read_all(model: TensorGroups, only: str) -> "Iterator[tuple[str, Tensor]]":
    for group in model.groups:
        yield from _read_group(model, group, only).items()


def _read_group(model: TensorGroups, group: str, only: str) -> "Mapping[str, Tensor]":
    found = model.read(group) if group in model.groups else {}
    return {key: tensor for key, tensor in found.items() if fnmatch.fnmatchcase(key, only)}


def _widen(tensor: "Tensor") -> "Iterator[Tensor]":
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK].double()


def _name(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")
