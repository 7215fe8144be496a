"""The original kit's layouts, read and never written: prepared shards and pipeline-stage checkpoints, both pickled.

Prepared: `pytorch_embs.pt`, `pytorch_<i>.pt`, `pytorch_lm_head.pt`, each with the names that our shards have, and with
buffers, which are not parameters. Checkpoints: `prank_<stage>_checkpoint.pt`, whose keys are "<position>.<name>": the
embedding is position 0 of stage 0, layers follow, the head is the last position of the last stage.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.formats.pickled import PickledFile
from openchatkit.models.config import ModelConfig
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, layer_number, shard_names

_STAGE_FILE = re.compile(r"prank_(\d+)_checkpoint\.pt")


def shard_file(shard: str) -> str:
    """Return the original's name of a prepared shard's file."""
    return {EMBED: "pytorch_embs.pt", HEAD: "pytorch_lm_head.pt"}.get(shard, f"pytorch_{layer_number(shard)}.pt")


def stage_file(stage: int) -> str:
    """Return the original's name of a stage's weights."""
    return f"prank_{stage}_checkpoint.pt"


def stage_files(folder: Path) -> list[str]:
    """Return the names of the stage files in a folder, by stage."""
    found = {int(m[1]): m[0] for entry in folder.iterdir() if (m := _STAGE_FILE.fullmatch(entry.name))}
    return [found[stage] for stage in sorted(found)]


def parameter_names(config: ModelConfig, shard: str, names: Iterable[str]) -> list[str]:
    """Return `names` of a shard without its buffers and without a tied projection."""
    kind = family(config)
    left = [name for name in names if kind.ignored.fullmatch(kind.hf_key(shard, name)) is None]
    tied = config.tie_embeddings and shard == HEAD
    return [name for name in left if not (tied and name == kind.tied_weight)]


class StageCheckpoint:
    """A checkpoint of the original kit, seen as shards: `file(shard)` and `keys(shard)` say where each tensor is.

    UserError when stages or layers are missing or too many, with the flags that would fit the files.
    """

    def __init__(self, folder: Path, config: ModelConfig, *, stages: int, layers_per_stage: int) -> None:
        self.folder, self.config = folder, config
        self._layers_per_stage = layers_per_stage
        found = stage_files(folder)
        if found != [stage_file(stage) for stage in range(stages)]:
            numbers = [name.split("_")[1] for name in found]
            raise UserError(
                f"{folder} holds the files of stages {', '.join(numbers) or 'none'}, --n-stages {stages} expects 0 to "
                f"{stages - 1}; copy the missing files here, or pass the number of stages it was trained with"
            )
        self._files = [PickledFile(folder / name) for name in found]
        self._where = {shard: self._place(shard, stages) for shard in shard_names(config.num_layers)}
        self._check(stages)

    def file(self, shard: str) -> PickledFile:
        """Return the file of the stage that holds a shard."""
        return self._files[self._where[shard][0]]

    def keys(self, shard: str) -> dict[str, str]:
        """Return {name in the shard: key in `file(shard)`} of a shard's tensors."""
        stage, position = self._where[shard]
        prefix = f"{position}."
        inside = [key.removeprefix(prefix) for key in self._files[stage].specs if key.startswith(prefix)]
        return {name: prefix + name for name in parameter_names(self.config, shard, inside)}

    def untied(self) -> tuple[str, str] | None:
        """Return the keys of embedding and projection where the config ties them and the files hold both, else None.

        The original trained them separately, so they may differ.
        """
        kind = family(self.config)
        stage, position = self._where[HEAD]
        key = f"{position}.{kind.tied_weight}"
        if not self.config.tie_embeddings or key not in self._files[stage].specs:
            return None
        return f"0.{kind.embedding_weight}", key

    def _place(self, shard: str, stages: int) -> tuple[int, int]:
        """Return stage and position of a shard under the layout that the flags describe."""
        number = layer_number(shard)
        if shard == EMBED:
            return 0, 0
        if number is None:
            number = self.config.num_layers
            stage = stages - 1
        else:
            stage = min(number // self._layers_per_stage, stages - 1)
        return stage, number - stage * self._layers_per_stage + (stage == 0)

    def _check(self, stages: int) -> None:
        """UserError unless the positions in the files are exactly those of the layout."""
        for stage, file in enumerate(self._files):
            expected = {position for where, position in self._where.values() if where == stage}
            found = {_position(file, key) for key in file.specs}
            if found != expected:
                raise UserError(
                    f"{file.path} does not hold the layers that --n-stages {stages} --n-layer-per-stage "
                    f"{self._layers_per_stage} give it: {self._describe_files()}"
                )

    def _describe_files(self) -> str:
        counts = []
        for stage, file in enumerate(self._files):
            positions = {_position(file, key) for key in file.specs}
            counts.append(len(positions) - (stage == 0) - (stage == len(self._files) - 1))
        total = sum(counts)
        if total != self.config.num_layers:
            return f"the stages hold {total} layers, the config {self.config.num_layers}; pass the right --config-name"
        return f"the stages hold {counts} layers; pass --n-stages {len(counts)} --n-layer-per-stage {counts[0]}"


def _position(file: PickledFile, key: str) -> int:
    position = key.split(".")[0]
    if not position.isdigit():
        raise UserError(f"{file.path} holds {key}, expected <position>.<name>; it is not a stage of the original kit")
    return int(position)
