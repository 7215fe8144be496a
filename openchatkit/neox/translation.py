"""A GPT-NeoX configuration -> the settings of the kit's trainer, and a line for each thing that is done otherwise."""

import importlib.util
import math
import netrc
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.formats import neox_settings
from openchatkit.neox import batches, data, model, optimizers
from openchatkit.neox.config import NeoxConfig
from openchatkit.settings import flag

_SAVE = "checkpoints"  # where a configuration without `save` keeps its checkpoints, in the current folder
_MODEL = "model"  # the folder in it that training starts from
_KEEP_ALL = 1 << 30

# The trainer's names of GPT-NeoX's rules for learning rates, by `lr_rule`.
_RATE_RULES = {"today": "neox", "2021": "neox-2021"}


@dataclass(frozen=True)
class TrainerRun:
    """`flags` of the trainer by the names of its settings, `model` is the folder to write, `notes` what to tell."""

    flags: Mapping[str, Any]
    model: Path | None
    save: Path
    notes: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """The flags as `training/dist_clm_train.py` takes them."""
        return to_arguments(self.flags)


def translate(config: NeoxConfig, *, ranks: int, on_gpu: bool) -> TrainerRun:
    """Return the trainer's run for a configuration on some ranks; UserError for what it cannot follow."""
    layers = config.need("num_layers")[0]
    neox_settings.choose_attention(config, layers)  # another architecture is named before what comes with it
    notes = config.check()
    replicas = batches.count_replicas(config, ranks)
    made = model.find_maker(config).get("tokenizer_type")
    if made not in (None, config.get("tokenizer_type")):
        notes.append(
            f"{config.where('tokenizer_type')}: {made} made the data: leave it out, unless both have the same tokens"
            if "tokenizer_type" in config.given
            else f"tokenizer_type is not given: it is {made}, which made the data"
        )
    save = Path(config.get("save") or _SAVE)
    if config.get("save") is None:
        notes.append(f"save is not given: checkpoints go to {save}")
    start = _choose_start(config, save, notes)
    flags = {
        **start,
        **data.translate(config),
        **_translate_batches(config, replicas, stages=max(config.get("pipe_parallel_size"), 1)),
        **_translate_layout(config, replicas),
        **optimizers.translate_optimizer(config, replicas=replicas, notes=notes),
        **_translate_learning_rate(config, notes),
        **_translate_precision(config, notes, on_gpu=on_gpu),
        **_translate_saving(config, save, notes),
        **_translate_logging(config, notes),
        **optimizers.translate_norms(config, notes),
    }
    written = None if "load_pretrained_model" not in flags else save / _MODEL
    return TrainerRun(flags, written, save, tuple(notes))


def to_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as the trainer takes them; None leaves one out."""
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in flags.items()}
    return [f"{flag(name)}={text}" for name, text in texts.items() if text is not None]


def has_checkpoints(save: Path) -> bool:
    """Return whether a run has left checkpoints in its folder; UserError where they are GPT-NeoX's own."""
    return _find_checkpoint(save) is not None


def _find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder; UserError where it holds those of GPT-NeoX itself."""
    if not folder.is_dir():
        return None
    # They import torch, which takes seconds, and which deepy.py needs for nothing else.
    from openchatkit.formats import checkpoint_folders, neox_layout

    if neox_layout.find(folder):
        raise UserError(
            f"{folder} holds checkpoints of GPT-NeoX itself: run `python tools/convert_from_neox.py {folder} "
            "--save-dir MODEL` and give load MODEL with finetune true, or name another folder"
        )
    return checkpoint_folders.latest(folder)


def _choose_start(config: NeoxConfig, save: Path, notes: list[str]) -> dict[str, Any]:
    """Return where weights come from: random ones, the run's own checkpoint, or with `finetune` another run's."""
    fresh = {"model_name": save / _MODEL, "load_pretrained_model": False}
    load = None if config.get("load") is None else Path(config.get("load"))
    if load is None and config.get("finetune"):
        raise UserError(f"{config.where('finetune')}: load is not given: name the folder of the run to start from")
    if load is None:
        return fresh | {"load_checkpoint": False}
    same = load.resolve() == save.resolve()
    found = None if same else _find_checkpoint(load)
    if config.get("finetune"):
        if same:
            raise UserError(f"{config.where('finetune')}: load and save are both {save}: give another save")
        if found is None and model.is_written(load):
            found = load  # a prepared model
        if found is None:
            raise UserError(f"{config.where('finetune')}: {load} holds no checkpoint to start from")
        return {"model_name": found}
    if found is not None:
        raise UserError(
            f"{config.where('load')} is not save {save}: a run continues in its own folder; make them one, or give "
            "finetune true to start a new run from these weights"
        )
    if not same:
        notes.append(f"{config.where('load')} holds no checkpoint: training starts from random weights")
    return fresh


def _translate_batches(config: NeoxConfig, replicas: int, *, stages: int) -> dict[str, Any]:
    """Return batch sizes. A pipeline takes all micro-batches of a step as one batch, as GPT-NeoX's does."""
    sizes = batches.derive(config, replicas)
    return {
        "batch_size": sizes.micro * sizes.accumulation,
        "micro_batch_size": sizes.micro,
        "gradient_accumulate_step": 1,
        "pp_mode": "1f1b" if 1 < stages <= sizes.accumulation else "gpipe",
        **_translate_length(config),
    }


def _translate_length(config: NeoxConfig) -> dict[str, Any]:
    steps, epochs = config.get("train_iters"), config.get("train_epochs")
    if (steps is None) == (epochs is None):
        found = "none of them is given" if steps is None else "both are given"
        raise UserError(f"give train_iters or train_epochs, one of the two: {found}")
    return {"total_steps": steps, "nepochs": epochs}


def _translate_layout(config: NeoxConfig, replicas: int) -> dict[str, Any]:
    zero = config.block("zero_optimization")
    modes = {0: "allreduce", 1: "sharded", 2: "sharded-gradients", 3: "sharded-parameters"}
    stage, parts = zero["stage"], max(config.get("model_parallel_size"), 1)
    if stage not in modes:
        raise UserError(f"zero_optimization.stage {stage}: the kit's trainer has stages {', '.join(map(str, modes))}")
    stages = max(config.get("pipe_parallel_size"), 1)
    if stage >= 2 and stages > 1:
        raise UserError(
            f"zero_optimization.stage {stage} and pipe_parallel_size {stages} exclude each other: use stage 1, or "
            "pipe_parallel_size 0"
        )
    offload = zero["offload_optimizer"] or {}
    return {
        "pipeline_group_size": stages,
        "tensor_group_size": parts,
        "data_group_size": replicas,
        "sequence_parallel": config.get("sequence_parallel") and parts > 1,
        "dp_mode": modes[stage],
        "use_offload": zero["cpu_offload"] or offload.get("device", "none") != "none",
        "activation_checkpointing": "full" if config.get("checkpoint_activations") else "none",
    }


def _translate_learning_rate(config: NeoxConfig, notes: list[str]) -> dict[str, Any]:
    """Return the learning rate by GPT-NeoX's rule of today, or of 2021 where `lr_rule`, a key of the kit, says so."""
    lr, style = config.block("optimizer.params")["lr"], config.get("lr_decay_style")
    if config.get("min_lr") > lr:
        raise UserError(f"{config.where('min_lr')} is above optimizer.params.lr {lr}: make it smaller")
    if not 0 <= config.get("warmup") < 1:
        raise UserError(f"{config.where('warmup')}: expected a share of the steps, at least 0 and below 1")
    # GPT-NeoX itself has no wsd.
    rule = "kit" if style == "wsd" and "lr_rule" not in config.given else _RATE_RULES[config.get("lr_rule")]
    if rule != "kit" and "lr_rule" not in config.given and config.get("warmup"):
        notes.append(
            f"the learning rate follows GPT-NeoX's rule of today for {style}; lr_rule 2021 is that of GPT-NeoX-20B and "
            "Pythia (docs/neox.md)"
        )
    decay_steps = _find_decay_steps(config, notes)
    rising = config.get("warmup") * (decay_steps or config.get("train_iters") or 0)  # 0: train_epochs; not known yet
    if rule == _RATE_RULES["today"] and 0 < rising < 1:
        notes.append(
            f"{config.where('warmup')}: it is less than a step, and as in GPT-NeoX of today the first step has the "
            f"rate {lr / rising:.3g}, above optimizer.params.lr {lr}: give warmup 0"
        )
    return {
        "lr_rule": rule,
        "lr_decay_style": style,
        "min_lr": config.get("min_lr"),
        "warmup_fraction": config.get("warmup"),
        "lr_decay_steps": decay_steps,
        "wsd_decay_share": config.get("wsd_decay_share"),
    }


def _find_decay_steps(config: NeoxConfig, notes: list[str]) -> int | None:
    """Return the steps until the learning rate has fallen; None: all steps of the run."""
    name, found = "lr_decay_iters", config.get("lr_decay_iters")
    if found is None and (share := config.get("lr_decay_fraction")) is not None:
        name, steps = "lr_decay_fraction", config.get("train_iters")
        if steps is None:
            notes.append(f"{config.where(name)}: it has no effect with train_epochs: give lr_decay_iters")
            return None
        found = math.floor(steps * share)
    if found is not None and found < 1:
        raise UserError(f"{config.where(name)}: expected at least one step")
    return None if found is None else int(found)


def _translate_precision(config: NeoxConfig, notes: list[str], *, on_gpu: bool) -> dict[str, Any]:
    """Return the precision, and the loss scale of float16. Without a GPU, products are in what the processor has."""
    precision = config.precision
    if not on_gpu and precision != "float32":
        found = {"float16": "float32", "bfloat16": "auto"}[precision]
        words = {"float32": "in float32", "auto": "in bfloat16 where the processor has it, else in float32"}[found]
        notes.append(f"{precision} is for GPUs, and there is none: products are {words}")
        precision = found
    if precision != "float16":
        return {"precision": precision}
    return {"precision": precision, **optimizers.translate_loss_scale(config)}


def _translate_saving(config: NeoxConfig, save: Path, notes: list[str]) -> dict[str, Any]:
    factor, grows = config.get("checkpoint_factor"), config.get("checkpoint_scale") == "log"
    if factor is not None and not grows and (factor < 1 or factor != int(factor)):
        raise UserError(f"{config.where('checkpoint_factor')}: expected a whole number of steps")
    if factor is not None and grows and factor <= 1:
        raise UserError(
            f"{config.where('checkpoint_factor')}: checkpoint_scale log saves after its powers: give a number above 1"
        )
    return {
        "checkpoint_path": save,
        "checkpoint_steps": 0 if factor is None or grows else int(factor),
        "checkpoint_growth": factor if grows else None,
        "extra_save_steps": _find_extra_steps(config, notes),
        "exit_interval": config.get("exit_interval"),
        "keep_checkpoints": config.get("keep_last_n_checkpoints") or _KEEP_ALL,
        "checkpoint_upload_prefix": config.get("s3_path"),
    }


def _find_extra_steps(config: NeoxConfig, notes: list[str]) -> str | None:
    """Return `extra_save_iters` as the trainer takes them. Step 0 needs no checkpoint: the seed makes it again."""
    given = config.get("extra_save_iters") or []
    steps = [step for step in given if isinstance(step, int) and not isinstance(step, bool) and step >= 0]
    if len(steps) < len(given):
        raise UserError(f"{config.where('extra_save_iters')}: expected a list of whole numbers of at least 0")
    if 0 in steps:
        notes.append(
            f"extra_save_iters 0: the weights that training starts from are not saved: seed {config.get('seed')} makes "
            "them again"
        )
    return ",".join(str(step) for step in steps if step) or None


def _translate_logging(config: NeoxConfig, notes: list[str]) -> dict[str, Any]:
    """Return where the numbers go besides the console and metrics.jsonl; GPT-NeoX, too, goes on without a logger."""
    backends, flags = ["print"], {"curve_names": "neox"}
    if config.get("log_dir"):
        backends.append("loguru")
        flags["log_dir"] = config.get("log_dir")
    if config.get("tensorboard_dir"):
        if importlib.util.find_spec("tensorboard") is None:
            where = config.where("tensorboard_dir")
            notes.append(f"{where}: nothing is written: pip install 'openchatkit[tensorboard]'")
        else:
            backends.append("tensorboard")
            flags["tensorboard_dir"] = config.get("tensorboard_dir")
    if config.get("use_wandb"):
        if importlib.util.find_spec("wandb") is None:
            notes.append(f"{config.where('use_wandb')}: nothing is sent: pip install 'openchatkit[wandb]'")
        elif not _has_wandb_key(config.get("wandb_host")):
            notes.append(f"{config.where('use_wandb')}: nothing is sent: run `wandb login`, or set WANDB_MODE=offline")
        else:
            backends.append("wandb")
            flags |= {name: config.get(name) for name in ("wandb_team", "wandb_group", "wandb_run_name")}
            flags["project_name"] = config.get("wandb_project")
    return {"train_log_backend": ",".join(backends), **flags}


def _has_wandb_key(host: str) -> bool:
    """Return whether wandb can log in, or need not; without a key GPT-NeoX goes on without it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        return netrc.netrc().authenticators(urllib.parse.urlsplit(host).hostname or host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
