"""From settings to a trainer that is ready for its next step; most of what can fail fails before the ranks meet."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from openchatkit.data import options
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.distributed.layout import Layout, stage_numbers
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, ledger
from openchatkit.formats.tokenizer_files import has_tokenizer
from openchatkit.libraries import pytorch
from openchatkit.loading import hardware
from openchatkit.loading.stages import PreparedModel, open_prepared
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part
from openchatkit.models.registry import family
from openchatkit.models.stage import Stage
from openchatkit.settings import to_json
from openchatkit.training import checkpoints
from openchatkit.training.balance import balance_layers
from openchatkit.training.config import Settings
from openchatkit.training.fully_sharded import FullyShardedWeights, MatrixSharding
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.local_stages import LocalStages, join_parts
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.planner import plan_run
from openchatkit.training.precision import LossScaler, compute_dtype
from openchatkit.training.rank_weights import RankWeights
from openchatkit.training.schedules import SCHEDULES
from openchatkit.training.step import Schedule, Trainer
from openchatkit.training.uploads import check_upload
from openchatkit.training.weights import Weights

_DROPOUT = ("hidden_dropout", "attention_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class RunInputs:
    """Model, layout and data of a run, before any rank has met another."""

    shards: PreparedModel
    plan: PlannedRun
    dataset: Dataset
    evaluation: Dataset | None
    test: Dataset | None
    total_steps: int
    rates: LearningRates

    @property
    def layers(self) -> Sequence[tuple[int, int]]:
        """Each stage's first and last (exclusive) layer."""
        return self.plan.layers


@dataclass
class RunProgress:
    """Steps taken and tokens put through, both since the first start of a run.

    `ledger` is the chain of the ledger's rows up to the last checkpoint, which only rank 0 keeps up to date; None for
    a checkpoint from before there was one. `saved` is the step of the last checkpoint, and `proven` that of the last
    one with whose weights a step has been taken: only then are they known to be of use.
    """

    step: int = 0
    tokens: int = 0
    ledger: str | None = ledger.EMPTY
    saved: int | None = None
    proven: int | None = None


def prepare_run(settings: Settings) -> RunInputs:
    """Open the model and the data and check them against the flags; UserError for what does not fit."""
    if SCHEDULES[settings.pp_mode].v_shaped and not pytorch.runs_v_schedules():
        raise UserError(f"--pp-mode {settings.pp_mode} needs torch 2.13 or newer: use --pp-mode interleaved")
    shards = open_prepared(settings.model_name, weights=settings.load_pretrained_model)
    plan = plan_run(settings, shards.config, on_gpu=settings.use_cuda)
    _check_tokenizer(shards.config, Tokenizer(settings.tokenizer_name).vocab_size)
    data_options = options.from_settings(to_json(settings))
    dataset = build_dataset(settings.task_name, data_options)
    evaluations = 1 + (settings.total_steps or 0) // max(settings.evaluation_steps, 1)
    evaluation = _open_evaluation(settings, settings.evaluation_data, "--evaluation-data", data_options, evaluations)
    test = _open_evaluation(settings, settings.test_data, "--test-data", data_options, 1)
    if settings.rank == 0:
        _warn_of_model_settings(settings, shards)
        if settings.checkpoint_upload_prefix is not None:
            check_upload(settings.checkpoint_upload_prefix, json.dumps(shards.raw_config))
    total_steps = _count_steps(settings, dataset)
    run = RunInputs(shards, plan, dataset, evaluation, test, total_steps, settings.make_rates(total_steps))
    if settings.rank == 0:
        _log_epochs(dataset, run.total_steps * _count_rows(settings))
    return run


def _open_evaluation(
    settings: Settings, names: str | None, flag: str, data_options: DataOptions, evaluations: int
) -> Dataset | None:
    """Return the data of so many evaluations, if there are any; where they are one pass, it repeats."""
    if not names:
        return None
    rows = settings.batch_size * settings.data_group_size
    samples = evaluations * settings.evaluation_num_batch * rows
    wanted = None if data_options.wanted is None else samples
    return build_dataset(names, replace(data_options, wanted=wanted, rows=rows), flag=flag)


def settle_plan(settings: Settings, run: RunInputs, layout: Layout) -> RunInputs:
    """Return a run's inputs with the plan as this layout's devices decide it, the same on all ranks.

    They decide what is computed in, and with --balance auto each stage's layers.
    """
    dtype = compute_dtype(settings.precision, layout)
    plan = replace(run.plan, precision=_name(dtype), on_gpu=layout.device.type == "cuda")
    if settings.balance == "auto" and not settings.num_layers and layout.pipeline_size > 1:
        layers = balance_layers(
            run.shards.config,
            layout,
            stages=settings.stages,
            rows=settings.micro_batch_size,
            length=settings.seq_length,
            dtype=dtype,
            recompute=settings.recompute,
        )
        plan = replace(plan, layers=tuple(layers))
    return replace(run, plan=plan)


def build_trainer(settings: Settings, run: RunInputs, layout: Layout) -> tuple[Trainer, RunProgress]:
    """Build this rank's stages with the weights of the newest checkpoint, or of the model where there is none."""
    checkpoints.check_same_data([run.dataset, run.evaluation, run.test], layout)
    dtype = hardware.DTYPES[run.plan.precision]
    sharding = _share_parameters(settings, layout, dtype)
    stages = _make_stages(settings, run, layout, sharding)
    resumed = layout.together(lambda: _find_checkpoint(settings, run, layout))[layout.rank]
    layout.together(lambda: _fill(stages, settings, run, resumed, layout.device))
    trainer = _make_trainer(settings, run, layout, stages, dtype=dtype, sharding=sharding)
    if resumed is None:
        return trainer, RunProgress()
    checkpoints.load_optimizer(trainer.weights, resumed)
    state = checkpoint.read_state(resumed)
    trainer.scaler.load_state_dict(state["loss_scaler"])
    if layout.rank == 0:
        logger.info("resuming from {}", resumed)
        checkpoints.warn_of_changes(
            state, settings, path=resumed, total_steps=run.total_steps, dtype=_name(trainer.dtype)
        )
    return trainer, RunProgress(state["step"], state["tokens"], state.get("ledger"), state["step"], state.get("proven"))


def _share_parameters(settings: Settings, layout: Layout, dtype: torch.dtype) -> MatrixSharding | None:
    """Return how replicas share parameters, if they do. UserError where they cannot."""
    if settings.dp_mode != "sharded-parameters" or layout.data is None:
        return None
    if settings.sends_through_cpu(layout.device):
        raise UserError(
            "--dp-mode sharded-parameters and --dp-backend gloo exclude each other: layers are gathered on the GPUs; "
            "leave --dp-backend out, or use --dp-mode sharded"
        )
    return MatrixSharding(layout, dtype)


def _make_stages(
    settings: Settings, run: RunInputs, layout: Layout, sharding: MatrixSharding | None = None
) -> LocalStages:
    """Make this rank's stages, with parameters on the meta device; `sharding` cuts a shard as soon as it is filled."""
    kind, count = SCHEDULES[settings.pp_mode], len(run.layers)
    numbers = stage_numbers(
        layout.pipeline_rank,
        pipeline_size=layout.pipeline_size,
        stages_a_rank=count // layout.pipeline_size,
        v_shaped=kind.v_shaped,
    )
    with torch.device("meta"):
        stages = {
            number: Stage(
                run.shards.config,
                *run.layers[number],
                embed=number == 0,
                head=number == count - 1,
                recompute=settings.recompute,
                selective=settings.activation_checkpointing == "selective",
                offload=settings.activation_offload,
                part=Part(layout.tensor_rank, layout.tensor_size),
            )
            for number in numbers
        }
    for stage in stages.values():
        join_parts(stage, layout, splits_tokens=settings.sequence_parallel)
        if settings.compile is not None:
            stage.compile_layers(settings.compile)
    return LocalStages(stages, on_filled=None if sharding is None else sharding.cut)


def _fill(stages: LocalStages, settings: Settings, run: RunInputs, resumed: Path | None, device: torch.device) -> None:
    """Give stages their weights: a checkpoint's, the model's, or random ones."""
    if resumed is not None:
        # One pass over the bytes covers the weights and the optimizer's state.
        checkpoint.verify(resumed, checkpoints.list_source_shards(stages))
        checkpoints.load_weights(stages, resumed, device)
    elif settings.load_pretrained_model:
        checkpoints.load_weights(stages, run.shards, device)
    else:
        stages.init_weights(settings.seed, device)


def collect_state(settings: Settings, run: RunInputs, trainer: Trainer, progress: RunProgress) -> dict[str, Any]:
    """Return what state.json says of a run at this point."""
    layers_per_stage = run.layers[0][1] - run.layers[0][0]
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "samples": progress.step * trainer.global_batch,
        "global_batch": trainer.global_batch,
        "total_steps": run.total_steps,
        "data": run.dataset.fingerprint,
        "ledger": progress.ledger,
        "proven": progress.proven,
        "precision": _name(trainer.dtype),
        "loss_scaler": trainer.scaler.state_dict(),
        "layout": {
            "stages": len(run.layers),
            "layers_per_stage": layers_per_stage,
            "replicas": trainer.layout.replicas,
            "tensor": trainer.layout.tensor_size,
            "schedule": settings.pp_mode,
        },
        "settings": to_json(settings),
        "versions": checkpoints.collect_versions(),
    }


def _check_tokenizer(config: ModelConfig, vocabulary: int) -> None:
    """Raise UserError where the tokenizer has more tokens than the model."""
    if vocabulary > config.vocab_size:
        raise UserError(
            f"--tokenizer-name: the tokenizer has {vocabulary} tokens, the model's embedding {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def _count_steps(settings: Settings, dataset: Dataset) -> int:
    if settings.total_steps is not None:
        return settings.total_steps
    assert settings.nepochs is not None, "one of the two is given: see Settings"
    return math.ceil(settings.nepochs * dataset.epoch_samples / _count_rows(settings))


def _count_rows(settings: Settings) -> int:
    """Return the rows of a step."""
    return settings.batch_size * settings.gradient_accumulate_step * settings.data_group_size


def _warn_of_model_settings(settings: Settings, shards: PreparedModel) -> None:
    """Warn of dropout, which is not applied, and of a tokenizer that is not the model's."""
    ignored = () if family(shards.config).takes_views else _DROPOUT
    dropout = {key: value for key, value in shards.raw_config.items() if key in ignored and value}
    if dropout:
        stated = ", ".join(f"{key} {value:g}" for key, value in dropout.items())
        logger.warning("{}: {} in config.json has no effect, nothing is dropped out", shards.path, stated)
    if has_tokenizer(shards.path) and settings.tokenizer_name.resolve() != shards.path.resolve():
        own, given = Tokenizer(shards.path), Tokenizer(settings.tokenizer_name)
        if own.digest != given.digest:
            logger.warning(
                "--tokenizer-name {} gives other ids than the tokenizer of {}, which its embedding was trained with: "
                "leave the flag out unless the model is trained from scratch",
                settings.tokenizer_name,
                shards.path,
            )


def _log_epochs(dataset: Dataset, samples: int) -> None:
    """Say how often each source is gone through: with weights, some may be seen many times and others in part."""
    for source, epochs in zip(dataset.sources, dataset.epochs(samples), strict=True):
        logger.info("{}: {:.3g} epochs in {:,} samples of all sources", source.name, epochs, samples)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _find_checkpoint(settings: Settings, run: RunInputs, layout: Layout) -> Path | None:
    root = settings.checkpoint_path
    newest = checkpoints.find_newest(root, layout)
    if newest is None:
        return None
    if not settings.load_checkpoint:
        raise UserError(
            f"{root} holds checkpoints up to {newest.name}, which --load-checkpoint false would overwrite: "
            "give another --checkpoint-path or move them away"
        )
    checkpoints.check_same_model(newest, run.shards.config)
    checkpoints.check_resume(checkpoint.read_state(newest), settings, path=newest, data=run.dataset.fingerprint)
    return newest


def _make_weights(
    settings: Settings, layout: Layout, stages: LocalStages, *, dtype: torch.dtype, sharding: MatrixSharding | None
) -> RankWeights:
    if sharding is not None:
        return FullyShardedWeights(stages, layout, sharding)
    return Weights(
        stages,
        layout,
        dtype=dtype,
        sharded=settings.dp_mode == "sharded",
        shard_gradients=settings.dp_mode == "sharded-gradients",
        offloaded=settings.use_offload,
        through_cpu=settings.sends_through_cpu(layout.device),
    )


def _make_trainer(
    settings: Settings,
    run: RunInputs,
    layout: Layout,
    stages: LocalStages,
    *,
    dtype: torch.dtype,
    sharding: MatrixSharding | None,
) -> Trainer:
    weights = _make_weights(settings, layout, stages, dtype=dtype, sharding=sharding)
    weights.optimizer = build_optimizer(
        settings.optimizer,
        weights,
        moments=settings.moments,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        sm3_beta=settings.sm3_beta,
    )
    scaler = LossScaler.create(
        fp16=dtype == torch.float16,
        fixed=settings.loss_scale,
        initial=settings.initial_loss_scale,
        minimum=settings.min_loss_scale,
        window=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        consecutive=settings.consecutive_hysteresis,
    )
    schedule = Schedule(
        batch_size=settings.batch_size,
        accumulate=settings.gradient_accumulate_step,
        rates=run.rates,
        total_steps=run.total_steps,
        max_grad_norm=settings.max_grad_norm,
    )
    return Trainer(
        weights,
        scaler,
        schedule,
        dtype=dtype,
        pp_mode=settings.pp_mode,
        micro_batch_size=settings.micro_batch_size,
        seq_length=settings.seq_length,
        seed=settings.seed,
    )
