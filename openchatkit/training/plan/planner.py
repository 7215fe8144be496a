"""From settings and a model's config to the run as it is planned, or to the reason why there can be none."""

from dataclasses import replace

from openchatkit.distributed.layout import balanced_layers, stage_layers
from openchatkit.errors import UserError
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import check_parts
from openchatkit.models.sparse_attention import check_rows
from openchatkit.models.sparsity import read_sparsity
from openchatkit.training.config import MODEL_TYPES, Settings
from openchatkit.training.plan import work
from openchatkit.training.plan.planned_run import PlannedRun


def plan_run(settings: Settings, config: ModelConfig, *, on_gpu: bool = True) -> PlannedRun:
    """Return the run that settings describe; UserError where the model cannot be trained so.

    `--precision auto` counts as bfloat16, and `--balance auto` goes by operations, since nothing is measured here.
    """
    _check_model(settings, config)
    run = PlannedRun(
        config=config,
        layers=tuple(
            stage_layers(config.num_layers, stages=settings.stages, layers_per_stage=settings.num_layers),
        ),
        pipeline_size=settings.pipeline_group_size,
        replicas=settings.data_group_size,
        tensor_size=settings.tensor_group_size,
        schedule=settings.pp_mode,
        micro_batches=settings.batch_size // settings.micro_batch_size,
        micro_batch_size=settings.micro_batch_size,
        accumulate=settings.gradient_accumulate_step,
        seq_length=settings.seq_length,
        precision="bfloat16" if settings.precision == "auto" else settings.precision,
        recompute=settings.recompute,
        selective=settings.activation_checkpointing == "selective",
        dp_mode=settings.dp_mode,
        moments=settings.moments,
        sequence_parallel=settings.sequence_parallel,
        offload=settings.use_offload,
        activation_offload=settings.activation_offload,
        documents=settings.packing == "documents",
        on_gpu=on_gpu,
    )
    if settings.balance == "even" or settings.num_layers:
        return run
    layers = balanced_layers(config.num_layers, stages=settings.stages, head=work.head_cost(run))
    return replace(run, layers=tuple(layers))


def _check_model(settings: Settings, config: ModelConfig) -> None:
    family = MODEL_TYPES[settings.model_type] if settings.model_type else None
    if family and family != config.family:
        raise UserError(f"--model-type: the flag says {family}, the model's config.json {config.family}")
    if settings.embedding_dim and settings.embedding_dim != config.hidden_size:
        raise UserError(f"--embedding-dim {settings.embedding_dim}: the model's hidden size is {config.hidden_size}")
    if settings.seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {settings.seq_length}: the model was made for at most {config.max_position_embeddings} "
            "tokens"
        )
    check_parts(config, settings.tensor_group_size)
    if {*config.options.attention_config} - {"global"}:
        check_rows(read_sparsity(dict(config.options.sparsity_config)), settings.seq_length)
    if settings.dp_mode == "sharded-gradients" and config.tie_embeddings:
        raise UserError("--dp-mode sharded-gradients: the model's embeddings are tied; use --dp-mode sharded")
    if settings.dp_mode == "sharded-gradients" and config.options.pos_emb == "rpe":
        raise UserError(
            "--dp-mode sharded-gradients: the model's layers share their relative biases; use --dp-mode sharded"
        )
