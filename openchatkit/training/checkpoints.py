"""The checkpoint that a run starts from: which one, whether it fits the run, and what each rank loads of it."""

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from openchatkit.data.dataset import Dataset
from openchatkit.data.options import DataSettings
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import read_config
from openchatkit.loading.stages import PreparedModel
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import cut_shard
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.settings import fields, flag, to_json
from openchatkit.storage import storage_errors
from openchatkit.training.config import Settings
from openchatkit.training.learning_rates import LearningRateSettings
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.optimization import CONVERTIBLE, OptimizationSettings, format_flags, name_moments
from openchatkit.training.optimizer import convert_moments
from openchatkit.training.rank_weights import RankWeights

WeightSource = PreparedModel | Path


def list_source_shards(stages: LocalStages) -> list[str]:
    """Return the shards to fill stages from: their own, and for the projection of a tied model the embedding."""
    tied = stages.config.tie_embeddings and HEAD in stages.shards and EMBED not in stages.shards
    return [*stages.shards, *([EMBED] if tied else [])]


def load_weights(stages: LocalStages, source: WeightSource, device: torch.device) -> None:
    """Fill stages with float32 parameters on `device`, from a prepared model or from a verified checkpoint folder.

    Only the shards that this rank needs are opened; those of a prepared model are compared with its manifest first.
    """
    kind = family(stages.config)
    if not isinstance(source, Path):
        source.verify(list_source_shards(stages))
    for shard in stages.shards:
        tensors = _read(source, shard)
        for name, tensor in tensors.items():
            _check_finite(tensor, f"{name} of {shard}", source)
        if stages.config.tie_embeddings and shard == HEAD:
            tensors[kind.tied_weight] = _read(source, EMBED)[kind.embedding_weight]
        own = cut_shard(tensors, kind.cuts(stages.config), stages.part)
        stages.load(shard, {name: _copy(tensor, device) for name, tensor in own.items()})


def load_optimizer(weights: RankWeights, path: Path) -> None:
    """Give the optimizer of `weights` the state that a verified checkpoint holds for what it updates.

    Each tensor goes from the file to its parameter's device by itself. `Optimizer.load_state_dict` wants all of them at
    once, which for the ranks of one machine can be more than its memory.
    """
    config = weights.stages.config
    kind = family(config)
    for shard in weights.stages.shards:
        stored = checkpoint.read_optimizer(path, shard)
        if config.tie_embeddings and shard == HEAD:
            stored[kind.tied_weight] = checkpoint.read_optimizer(path, EMBED)[kind.embedding_weight]
        weights.take_state(shard, {name: convert_moments(state, weights.optimizer) for name, state in stored.items()})


def find_newest(root: Path, layout: Layout) -> Path | None:
    """Return the checkpoint to resume from; rank 0 decides for all, once it has tidied up after a killed save."""

    def find() -> Path | None:
        if layout.rank:
            return None
        with storage_errors(root):
            checkpoint.remove_leftovers(root)
        return checkpoint.latest(root)

    return layout.together(find)[0]


def check_resume(state: dict[str, Any], settings: Settings, *, path: Path, data: str) -> None:
    """Raise UserError if `state` cannot be resumed with these settings; warn if the data changed."""
    batches_a_step = settings.gradient_accumulate_step * settings.data_group_size
    recorded, given = state["global_batch"], settings.batch_size * batches_a_step
    if recorded != given:
        fits = recorded % batches_a_step == 0
        advice = f"give --batch-size {recorded // batches_a_step}" if fits else "no --batch-size makes that here"
        raise UserError(
            f"{path} was trained with {recorded} rows a step; --batch-size {settings.batch_size} x "
            f"--gradient-accumulate-step x --data-group-size makes {given}: {advice}, or start a new run in another "
            "--checkpoint-path"
        )
    recorded_settings = to_json(settings) | {"optimizer_state": "float32"} | state.get("settings", {})
    before = name_moments(*(recorded_settings[name] for name in ("optimizer", "optimizer_state", "momentum")))
    if before != settings.moments and not {before, settings.moments} <= CONVERTIBLE:
        raise UserError(
            f"{path} has the state of {format_flags(recorded_settings)}, of which none of "
            f"{format_flags(to_json(settings))} can be made: give the former, or start a new run in another "
            "--checkpoint-path"
        )
    if state["data"] != data:
        logger.warning("the data, its weights or its order differ from those of {}: going on with the new ones", path)


def warn_of_changes(state: dict[str, Any], settings: Settings, *, path: Path, total_steps: int, dtype: str) -> None:
    """Warn of each setting of data and optimization that differs from that of the run that wrote `state`.

    Of the length and the precision, what came of the flags is compared: `total_steps` and `dtype`.
    """
    outcomes = {name: state[name] for name in ("total_steps", "precision") if state.get(name) is not None}
    before = state.get("settings", {}) | outcomes
    now = to_json(settings) | {"total_steps": total_steps, "precision": dtype}
    groups = (DataSettings, LearningRateSettings, OptimizationSettings)
    names = [field.name for group in groups for field in fields(group)]
    for name in ("total_steps", *names):
        # A checkpoint from before there was a setting has none of it.
        if name in before and name not in _WITHOUT_EFFECT and before[name] != now[name]:
            was, becomes = ("not given" if value is None else value for value in (before[name], now[name]))
            logger.warning("{} was {} up to {} and is {} from here on", flag(name), was, path.name, becomes)


# Of no effect on a resume, or on what is trained; --precision is compared in place of its other names.
_WITHOUT_EFFECT = {"data_cache", "bf16", "fp16", "initial_loss_scale", "use_offload"}


def check_same_data(datasets: Sequence[Dataset | None], layout: Layout) -> None:
    """Raise UserError unless every rank found the same data."""
    found = layout.gather([None if dataset is None else dataset.fingerprint for dataset in datasets])
    for rank, fingerprints in enumerate(found):
        if fingerprints != found[0]:
            raise UserError(
                f"rank {rank} found other data than rank 0: give both the same flags, and the machines the same files "
                "under --task-name, --evaluation-data and --tokenizer-name"
            )


def collect_versions() -> dict[str, str]:
    """Return what a run's bits depend on besides its settings."""
    return {"python": platform.python_version(), "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def check_shared_folder(root: Path, layout: Layout) -> None:
    """Raise UserError unless every rank sees the folder that rank 0 sees."""

    def leave_file() -> str:
        if layout.rank:
            return ""
        with storage_errors(root):
            handle, name = tempfile.mkstemp(prefix=".seen_by_all_", dir=root)
        os.close(handle)
        return name

    name = layout.together(leave_file)[0]
    seen = layout.gather(Path(name).exists())
    if layout.rank == 0:
        Path(name).unlink()
    if not all(seen):
        raise UserError(
            f"--checkpoint-path {root}: rank {seen.index(False)} does not see the folder that rank 0 sees; "
            "put it on storage that all machines share"
        )


@contextlib.contextmanager
def lock_folder(root: Path, layout: Layout) -> Iterator[None]:
    """Lock the checkpoint folder for this run; UserError if another run has it. Free again however its holder ends."""
    with contextlib.ExitStack() as held:

        def lock_on_rank_0() -> None:
            if layout.rank == 0:
                held.enter_context(checkpoint.lock_run(root))

        layout.together(lock_on_rank_0)
        yield


def check_same_model(path: Path, config: ModelConfig) -> None:
    """Raise UserError when a checkpoint is of another model than --model-name."""
    if read_config(path)[1] != config:
        raise UserError(
            f"{path} is a checkpoint of another model than --model-name: give that model or another --checkpoint-path"
        )


def _read(source: WeightSource, shard: str) -> dict[str, Tensor]:
    return checkpoint.read_weights(source, shard) if isinstance(source, Path) else source.read(shard)


def _check_finite(tensor: Tensor, what: str, source: WeightSource) -> None:
    """Raise UserError for weights that no step could be taken with."""
    if not torch.stack(tensor.aminmax()).isfinite().all():
        folder = source if isinstance(source, Path) else source.path
        raise UserError(
            f"{folder}: {what} holds NaN or infinite numbers, with which nothing can be trained: prepare the model "
            "again from whole files, or go back to an earlier checkpoint"
        )


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    # What is read is a view of the file: training must never write there.
    return tensor.to(device=device, dtype=torch.float32, copy=True)
