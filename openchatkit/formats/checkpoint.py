"""Training checkpoints: a folder a step, written by many ranks, whole or not there at all.

    checkpoint_<step>/  embed.safetensors  embed.optimizer.safetensors  layer_00000.safetensors ...
                        state.json  config.json  tokenizer files  manifest.json
    latest              the step, as text; moved last

Files follow layers, never ranks, so any layout resumes any checkpoint. The folder grows under a temporary name:
`begin` (one rank), `write_weights`, `write_optimizer` and `reread` (each rank for its shards), `finish` (one rank, when
all are done). Other rooms reach `checkpoint_folders` (which folders there are, and which can be trusted) and `legacy`
through this module.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import manifest
from openchatkit.formats.checkpoint_folders import (
    LATEST,
    STATE,
    checkpoint_path,
    count_leftover_bytes,
    find,
    is_checkpoint,
    is_legacy,
    is_uploaded,
    latest,
    list_steps,
    list_to_upload,
    locate,
    lock_run,
    mark_uploaded,
    newest_verified,
    parse_step,
    point_to,
    prune,
    publish,
    read_latest,
    read_manifest,
    remove_leftovers,
    temporary_path,
)
from openchatkit.formats.layer_shards import CONFIG, check_shard, read_config, shard_file
from openchatkit.formats.legacy import StageCheckpoint
from openchatkit.formats.manifest import DamagedError, FileRecord, advise
from openchatkit.formats.tensor_file import TensorFile, write_tensors
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES, copy_tokenizer, read_json
from openchatkit.models.registry import config_from_hf
from openchatkit.models.shards import shard_names
from openchatkit.storage import check_room, drop_cached, storage_errors, write_text

__all__ = [
    "CONFIG",
    "LATEST",
    "STATE",
    "StageCheckpoint",
    "begin",
    "checkpoint_path",
    "count_leftover_bytes",
    "discard",
    "find",
    "finish",
    "is_checkpoint",
    "is_legacy",
    "is_uploaded",
    "latest",
    "list_files",
    "list_steps",
    "list_to_upload",
    "locate",
    "lock_run",
    "mark_uploaded",
    "newest_verified",
    "open_weights",
    "parse_step",
    "point_to",
    "prune",
    "read_latest",
    "read_manifest",
    "read_optimizer",
    "read_state",
    "read_weights",
    "remove_leftovers",
    "reread",
    "temporary_path",
    "verify",
    "verify_weights",
    "write_optimizer",
    "write_weights",
]

_OptimizerState = Mapping[str, Mapping[str, Any]]
_VALUES = "values"


def _optimizer_file(shard: str) -> str:
    """Return the name of the file with the optimizer's state of a shard's parameters."""
    return f"{shard}.optimizer.safetensors"


def begin(root: Path, step: int, *, needed: int = 0) -> Path:
    """Make the temporary folder that a checkpoint is written to, for one rank to call; leftovers of killed saves go.

    FullDiskError where the disk has no room for `needed` bytes.
    """
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        temporary = temporary_path(root, step)
        check_room(root, needed, str(checkpoint_path(root, step)), "make room, then run the same command again")
        temporary.mkdir()
    return temporary


def discard(temporary: Path) -> None:
    """Remove a checkpoint that could not be finished, so that a full disk gets its room back."""
    shutil.rmtree(temporary, ignore_errors=True)


def write_weights(temporary: Path, shard: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a shard's parameters, by their names in the shard; return the record for `finish`."""
    return write_tensors(temporary / shard_file(shard), tensors)


def write_optimizer(temporary: Path, shard: str, state: _OptimizerState) -> FileRecord:
    """Write the optimizer's state, {parameter's name in the shard: {key: tensor or JSON value}}; return its record."""
    tensors = {f"{name}/{key}": v for name, entry in state.items() for key, v in entry.items() if isinstance(v, Tensor)}
    values = {name: {k: v for k, v in entry.items() if not isinstance(v, Tensor)} for name, entry in state.items()}
    return write_tensors(temporary / _optimizer_file(shard), tensors, metadata={_VALUES: json.dumps(values)})


def list_files(path: Path) -> list[FileRecord]:
    """Return the records of all files of a checkpoint, that of its manifest last."""
    # First, so that it is never the manifest of other files than these where the step is saved again in between.
    own = manifest.record(path / manifest.MANIFEST)
    with _advice(path):
        listed = read_manifest(path)
    return [*listed.files.values(), own]


def reread(temporary: Path, records: Iterable[FileRecord]) -> None:
    """Compare files, one after another, with their records; DamagedError where the disk gives other bytes back."""
    with storage_errors(temporary), advise("the disk did not keep what was written: check it"):
        for record in records:
            drop_cached(temporary / record.name)
            manifest.check_bytes(temporary, record)


def finish(
    temporary: Path,
    root: Path,
    step: int,
    *,
    state: Mapping[str, Any],
    records: Iterable[FileRecord],
    raw_config: Mapping[str, Any],
    tokenizer_from: Path | None,
) -> Path:
    """Make the checkpoint whole and give it its name, then move `latest`. One rank calls this, after all have written.

    `records` are those of every rank; `state` must be JSON and should hold `layout` ({"stages", "layers_per_stage",
    "replicas"}). UserError when a file that another rank wrote is missing here, or not as it was written.
    """
    config = config_from_hf(dict(raw_config))
    listed = list(records)
    with advise("every rank must see the same checkpoint folder"):
        written = manifest.Manifest({record.name: record for record in listed}, {})
        manifest.check_sizes(temporary, written)
        manifest.check_sizes(temporary, written, map(shard_file, shard_names(config.num_layers)))
        for shard in shard_names(config.num_layers):
            check_shard(temporary, config, shard, TensorFile(temporary / shard_file(shard)).specs)
    with storage_errors(temporary):
        write_text(temporary / STATE, json.dumps(state, indent=1) + "\n")
        write_text(temporary / CONFIG, json.dumps(raw_config, indent=2) + "\n")
        names = copy_tokenizer(tokenizer_from, temporary) if tokenizer_from else []
        listed += [manifest.record(temporary / name) for name in (STATE, CONFIG, *names)]
        manifest.write(temporary, listed, about={"step": step})
        return publish(temporary, root, step)


def verify(path: Path, shards: Iterable[str] | None = None) -> None:
    """Compare the bytes of `shards` and of what belongs to all of them (default: of every file) with the manifest.

    DamagedError names the file, and the newest checkpoint beside it that is as it was written.
    """
    with _advice(path):
        listed = read_manifest(path)
        names = None
        if shards is not None:
            wanted = list(shards)
            optional = (STATE, CONFIG, *TOKENIZER_FILES, *map(_optimizer_file, wanted))
            names = [*map(shard_file, wanted), *(name for name in optional if name in listed.files)]
        manifest.verify(path, names, manifest=listed)


def verify_weights(path: Path, shard: str) -> None:
    """`verify` for the one file that holds a shard's weights."""
    with _advice(path):
        manifest.verify(path, [shard_file(shard)], manifest=read_manifest(path))


def read_state(path: Path) -> dict[str, Any]:
    """Return the `state` that `finish` was given, verified; UserError for the original kit's, which have none."""
    if is_legacy(path):
        raise UserError(
            f"{path} is a checkpoint of the original kit, which holds no state to resume from: "
            "make a model of it with tools/convert_to_hf_gptneox.py, prepare that, and train from there"
        )
    with _advice(path):
        manifest.verify(path, [STATE], manifest=read_manifest(path))
    return read_json(path / STATE)


def open_weights(path: Path, shard: str) -> TensorFile:
    """Open the file of a shard's parameters and check names and shapes; `verify` checks its bytes."""
    with _advice(path):
        file = TensorFile(path / shard_file(shard))
    check_shard(path, read_config(path)[1], shard, file.specs)
    return file


def read_weights(path: Path, shard: str) -> dict[str, Tensor]:
    """A shard's parameters, memory-mapped; see `open_weights`."""
    file = open_weights(path, shard)
    return file.read(file.specs)


def read_optimizer(path: Path, shard: str) -> dict[str, dict[str, Any]]:
    """Return what `write_optimizer` was given for a shard, its tensors memory-mapped."""
    with _advice(path):
        file = TensorFile(path / _optimizer_file(shard))
    state: dict[str, dict[str, Any]] = json.loads(file.metadata[_VALUES])
    for stored, tensor in file.read(file.specs).items():
        name, _, key = stored.rpartition("/")
        state[name][key] = tensor
    return state


@contextlib.contextmanager
def _advice(path: Path) -> Iterator[None]:
    """Add to a DamagedError the checkpoint to go back to."""
    try:
        yield
    except DamagedError as error:
        other = newest_verified(path.parent, but=path)
        if other is None:
            advice = f"no other checkpoint in {path.parent} is whole"
        else:
            command = f"`echo {manifest.read(other).about['step']} > {path.parent / LATEST}`"
            advice = f"the newest verified checkpoint is {other}: {command} resumes from it"
        raise DamagedError(f"{error}; {advice}") from error
