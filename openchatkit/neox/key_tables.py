"""The rows of `keys`: every key that GPT-NeoX's configuration files may hold, by subject, with its default and outcome.

To let the trainer follow another value, add it to the row's `only`, or drop `only` where it follows all, and translate
it in `translation` or `model`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["use", "ignore", "differ", "refuse"]


@dataclass(frozen=True)
class Key:
    """One key, with its `outcome` (see `keys`); `only` are the values that can be followed.

    `kind` says how a value is read (see `keys.read_value`), `choices` are the texts that GPT-NeoX knows.
    """

    outcome: Outcome
    kind: str = "any"
    default: Any = None
    choices: tuple[str, ...] = ()
    only: tuple[Any, ...] | None = None
    why: str = ""


def _use(
    kind: str,
    default: Any = None,
    *,
    choices: str = "",
    only: Collection[Any] | None = None,
    why: str = "",
    outcome: Outcome = "use",
) -> Key:
    assert (only is None) == (not why), "values that cannot be followed need a reason"
    return Key(outcome, kind, default, tuple(choices.split()), None if only is None else tuple(only), why)


def _ignore(names: str, why: str) -> dict[str, Key]:
    return {name: Key("ignore", why=why) for name in names.split()}


def _refuse(names: str, why: str, only: Collection[Any] = ()) -> dict[str, Key]:
    return {name: Key("refuse", only=(None, False, 0, *only), why=why) for name in names.split()}


_NOT_YET = "the kit's trainer does not have it yet"
_INITS = (
    "normal scaled_normal single_residual_scaled_normal small_init wang_init orthogonal scaled_orthogonal "
    "xavier_uniform xavier_normal"
)

MODEL: Mapping[str, Key] = {
    "num_layers": _use("whole"),
    "hidden_size": _use("whole"),
    "num_attention_heads": _use("whole"),
    "seq_length": _use("whole"),
    "max_position_embeddings": _use("whole"),
    "intermediate_size": _use("whole"),
    "expansion_factor": _use("number"),
    "make_vocab_size_divisible_by": _use("whole", 128),
    "norm": _use(
        "text",
        "layernorm",
        # rmsnorm_2021 is of the kit: GPT-NeoX's rmsnorm until May 2025.
        choices=(
            "layernorm apexlayernorm rmsnorm rmsnorm_2021 scalenorm non_parametric_layernorm te_rmsnorm te_layernorm"
        ),
        only=["layernorm", "rmsnorm", "rmsnorm_2021", "scalenorm", "non_parametric_layernorm"],
        why="transformer-engine is not used: use layernorm or rmsnorm",
    ),
    "layernorm_epsilon": _use("number", 1e-5),
    "rms_norm_epsilon": _use("number", 1e-8),
    "scalenorm_epsilon": _use("number", 1e-8),
    "use_qk_layernorm": _use("truth", False),
    "pos_emb": _use("text", "learned", choices="learned sinusoidal rotary rpe alibi none"),
    "rpe_num_buckets": _use("whole", 32),
    "rpe_max_distance": _use("whole", 128),
    "rpe_rule": _use("text", "today", choices="today 2021"),  # of the kit
    "rotary_pct": _use("number", 1.0),
    "rotary_emb_base": _use("number", 10000),
    "no_weight_tying": _use("truth", False),
    "gpt_j_residual": _use("truth", False),
    "gpt_j_tied": _use("truth", False),
    "activation": _use("text", "gelu", choices="gelu geglu relu softsign swish mish silu reglu swiglu bilinear glu"),
    "mlp_multiple_of": _use("whole", 1),
    "bias_gelu_fusion": _use("truth", False),
    "use_bias_in_attn_linear": _use("truth", True),
    "use_bias_in_mlp": _use("truth", True),
    "num_kv_heads": _use("whole"),
    "attention_config": _use("list"),
    "sparsity": _use("text", "none", choices="none all interspersed"),
    "sparsity_config": _use("block"),
    "sliding_window_width": _use("whole"),
    "hidden_dropout": _use("number", 0.0),
    "attention_dropout": _use("number", 0.0),
    "init_method": _use("text", "normal", choices=_INITS),
    "output_layer_init_method": _use("text", "scaled_normal", choices=_INITS),
    "init_method_std": _use("number", 0.02),
    **_refuse("apply_residual_connection_post_layernorm", _NOT_YET),
    **_refuse("opt_pos_emb_offset", "the first token has the first row of a table of positions"),
    **_ignore(
        "scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion rope_fusion "
        "layernorm_fusion rmsnorm_fusion use_flashattn_swiglu output_layer_parallelism use_cpu_initialization "
        "rotary_save_freqs_buffer apply_query_key_layer_scaling attention_softmax_in_fp32 use_bias_in_norms "
        "param_sharing_style mlp_type",
        "it changes no result",
    ),
}

_CONFIG_WINS = "the configuration wins on a resume, and each changed value is named"

TRAINING: Mapping[str, Key] = {
    "train_batch_size": _use("whole"),
    "train_micro_batch_size_per_gpu": _use("whole"),
    "gradient_accumulation_steps": _use("whole", 1),
    "train_iters": _use("whole"),
    "train_epochs": _use("whole"),
    "optimizer": _use("block"),
    "use_bnb_optimizer": _use("truth", False),
    "weight_decay": _use("number", 0.1),
    "gradient_clipping": _use("number", 1.0),
    "precision": _use("text", choices="fp16 fp32 bfloat16"),
    "fp16": _use("block"),
    "bf16": _use("block"),
    "zero_optimization": _use("block"),
    "warmup": _use("number", 0.01),
    "lr_decay_style": _use("text", "linear", choices="constant linear cosine exponential wsd"),
    "lr_decay_iters": _use("whole"),
    "lr_decay_fraction": _use("number"),
    "min_lr": _use("number", 0.0),
    # Of the kit, as is wsd.
    "lr_rule": _use("text", "today", choices="today 2021"),
    "wsd_decay_share": _use("number", 0.1),
    "use_checkpoint_lr_scheduler": _use("truth", False, only=[False], why=_CONFIG_WINS),
    "checkpoint_activations": _use("truth", False),
    "seed": _use("whole", 1234),
    "save": _use("text"),
    "load": _use("text"),
    "finetune": _use("truth", False),
    "checkpoint_factor": _use("number"),
    "checkpoint_scale": _use("text", "linear", choices="linear log"),
    "extra_save_iters": _use("list"),
    "exit_interval": _use("whole", 0),
    "keep_last_n_checkpoints": _use("whole"),
    "eval_interval": _use("whole", 1000),
    "eval_iters": _use("whole", 100),
    "data_types": _use("block"),
    "eod_mask_loss": _use("truth", False),
    "char_level_ppl": _use("truth", False),
    **_refuse("no_load_optim", _NOT_YET),
    **_refuse("z_loss", "it belongs to the training of reward models"),
    **{
        name: Key("differ", only=(None, False), why=why)
        for name, why in {
            "no_save_optim": "the optimizer's state is saved with each checkpoint",
        }.items()
    },
    **_ignore("override_lr_scheduler", _CONFIG_WINS),
    **_ignore("no_save_rng no_load_rng", "a checkpoint holds no generator: randomness is a function of seed and step"),
    **_ignore(
        "checkpoint_num_layers partition_activations contiguous_checkpointing checkpoint_in_cpu synchronize_each_layer "
        "profile_backward deepspeed_activation_checkpointing activation_checkpointing",
        "how layers are recomputed changes no result",
    ),
    **_ignore(
        "fp16_lm_cross_entropy fp32_allreduce communication_data_type prescale_gradients gradient_predivide_factor "
        "sparse_gradients",
        "loss and sums of gradients are in float32",
    ),
    **_ignore("zero_allow_untested_optimizer load_universal checkpoint", "any layout resumes any checkpoint"),
    **_ignore("checkpoint_validation_with_forward_pass", "checkpoints are verified by SHA-256"),
    "s3_path": _use("text"),
    **_ignore("s3_chunk_size", "uploads choose the sizes of their pieces"),
}

DATA: Mapping[str, Key] = {
    "data_path": _use("text"),
    "split": _use("text", "969, 30, 1"),
    "train_data_paths": _use("texts"),
    "valid_data_paths": _use("texts"),
    "test_data_paths": _use("texts"),
    "train_data_weights": _use("numbers"),
    "valid_data_weights": _use("numbers"),
    "test_data_weights": _use("numbers"),
    "train_label_data_paths": _use("texts"),
    "valid_label_data_paths": _use("texts"),
    "test_label_data_paths": _use("texts"),
    "tokenizer_type": _use(
        "text",
        "GPT2BPETokenizer",
        choices="GPT2BPETokenizer HFTokenizer HFGPT2Tokenizer SPMTokenizer CharLevelTokenizer TiktokenTokenizer",
        only=["GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "CharLevelTokenizer"],
        why="training needs a tokenizer of the tokenizers library: use one of HFTokenizer",
    ),
    "vocab_file": _use("text"),
    "merge_file": _use("text"),
    "pack_impl": _use("text", "packed", choices="packed pack_until_overflow unpacked"),
    "allow_chopped": _use("truth", True),
    "weight_by_num_documents": _use("truth", False),
    "weighted_sampler_alpha": _use("number", 1.0),
    **_refuse("reset_position_ids reset_attention_mask", "it did nothing in GPT-NeoX: leave it out"),
    **_ignore("weighted_document_limit", "it belongs to a choice that is not made"),
    **_ignore("data_impl mmap_warmup num_workers use_shared_fs short_seq_prob", "stores are memory-mapped"),
}

_DERIVED = "GPT-NeoX derives it"
RUNNING: Mapping[str, Key] = {
    "pipe_parallel_size": _use("whole", 0),
    "model_parallel_size": _use("whole", 1),
    "sequence_parallel": _use("truth", False),
    "hostfile": _use("text"),
    "include": _use("text"),
    "exclude": _use("text"),
    "num_nodes": _use("whole", -1),
    "num_gpus": _use("whole"),
    "global_num_gpus": _use("whole"),
    "master_addr": _use("text"),
    "master_port": _use("whole", 29500),
    "launcher": _use(
        "text",
        "pdsh",
        choices="pdsh ssh slurm openmpi mvapich mpich impi jsrun local",
        only=["pdsh", "ssh", "slurm", "local"],
        why="there are no MPI launchers: use ssh (pdsh counts as it) or slurm",
    ),
    "deepspeed_slurm": _use("truth", False),
    "comment": _use("text"),
    "force_multi": _use("truth", False),
    **_refuse("deepspeed_mpi", "there are no MPI launchers: use launcher ssh or slurm"),
    **_ignore("pipe_partition_method", "stages are of equal numbers of layers, or as the trainer's --balance says"),
    **_ignore(
        "distributed_backend no_ssh_check detect_nvlink_pairs deepspeed deepscale deepscale_config lazy_mpu_init "
        "user_script config_files adlr_autoresume adlr_autoresume_interval onnx_safe autotuning_run account",
        "torch.distributed and the kit's launcher start the ranks",
    ),
    **_ignore(
        "steps_per_print wall_clock_breakdown dump_state flops_profiler comms_logger csv_monitor deepspeed_extra_args "
        "fused_kernels_build_path sparse_attention tensorboard wandb",
        "there is no DeepSpeed here",
    ),
    **{
        name: Key("refuse", only=(None,), why=f"{_DERIVED}: {instead}")
        for name, instead in {
            "batch_size": "give train_micro_batch_size_per_gpu",
            "clip_grad": "give gradient_clipping",
            "zero_stage": "give zero_optimization",
            "zero_reduce_scatter": "give zero_optimization",
            "zero_contiguous_gradients": "give zero_optimization",
            "zero_reduce_bucket_size": "give zero_optimization",
            "zero_allgather_bucket_size": "give zero_optimization",
            "lr": "give optimizer.params.lr",
            "optimizer_type": "give optimizer.type",
            "padded_vocab_size": "give make_vocab_size_divisible_by",
            "dynamic_loss_scale": "give fp16.loss_scale",
            "loss_scale": "give fp16.loss_scale",
            "loss_scale_window": "give fp16.loss_scale_window",
            "hysteresis": "give fp16.hysteresis",
            "min_scale": "give fp16.min_loss_scale",
            "is_pipe_parallel": "give pipe_parallel_size",
            **dict.fromkeys(("world_size", "rank", "local_rank"), "the launcher gives it"),
            **dict.fromkeys(
                ("do_train", "do_valid", "do_test", "save_iters", "curriculum_seqlen", "git_hash", "tokenizer"),
                "leave it out",
            ),
        }.items()
    },
}

LOGGING: Mapping[str, Key] = {
    "use_wandb": _use("truth"),
    "wandb_project": _use("text", "neox"),
    "wandb_run_name": _use("text"),
    "wandb_team": _use("text"),
    "wandb_group": _use("text"),
    "tensorboard_dir": _use("text"),
    "wandb_host": _use("text", "https://api.wandb.ai"),
    **_ignore("wandb_init_all_ranks", "rank 0 sends"),
    "log_dir": _use("text"),
    **_ignore("log_interval", "each step is logged, in metrics.jsonl beside the checkpoints"),
    "log_grad_norm": _use("truth", False),
    "log_param_norm": _use("truth", False),
    "log_optimizer_states": _use("truth", False),
    **_ignore(
        "log_grad_pct_zeros log_gradient_noise_scale gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload",
        "of gradients, norms are logged",
    ),
    **_ignore(
        "profile profile_step_start profile_step_stop memory_profiling memory_profiling_path",
        "a run is profiled by --profiling of training/dist_clm_train.py",
    ),
    **_ignore(
        "use_comet comet_workspace comet_project comet_experiment_name comet_tags comet_others comet_experiment",
        "there is no comet: use wandb",
    ),
}

# Read by generation and evaluation, which training has no use for.
GENERATION: Mapping[str, Key] = {
    "text_gen_type": _use(
        "text",
        choices="unconditional input-file interactive precompute",
        only=[None, "unconditional", "input-file", "interactive"],
        why="there is no store of logits: use unconditional, input-file or interactive",
    ),
    "temperature": _use("number", 0.0),
    "top_k": _use("whole", 0),
    "top_p": _use("number", 0.0),
    "maximum_tokens": _use("whole", 64),
    "prompt_end": _use("text", "\n"),
    "sample_input_file": _use("text"),
    "sample_output_file": _use("text"),
    "num_samples": _use("whole", 1),
    "recompute": _use("truth", False),
    **_refuse("return_logits", "logits are not written: openchatkit.minimal20b gives a model's, in Python"),
    **_ignore("precompute_model_name", "there is no store of logits"),
    "iteration": _use("whole"),
    "eval_results_prefix": _use("text", ""),
    "eval_tasks": _use("texts"),
    "eval_include_paths": _use("texts"),  # of the kit
}

_ARCHITECTURE = "another architecture, which the kit does not have"
REFUSED: Mapping[str, Key] = {
    **_refuse(
        "mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion mamba_use_bias_in_linears "
        "dim_att head_size ffn_dim num_unique_layers model_arch num_encoder_layers decoder_seq_length",
        _ARCHITECTURE,
        only=("gpt2",),
    ),
    **_refuse("mamba_selective_fp32_params mamba_use_bias_in_conv", _ARCHITECTURE, only=(True,)),
    **_refuse("gmlp_attn_dim", _ARCHITECTURE, only=(64,)),
    **_refuse("moe_num_experts", "mixtures of experts are not here", only=(1,)),
    **_ignore(
        "moe_top_k use_tutel moe_loss_coeff moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity "
        "moe_token_dropping create_moe_param_group moe_use_residual moe_expert_parallel_size moe_type moe_glu "
        "moe_lbl_in_fp32 moe_jitter_eps enable_expert_tensor_parallelism expert_interval",
        "one expert is a plain MLP",
    ),
    **_refuse(
        "te_columnparallel te_rowparallel te_layernorm_mlp te_mha te_fp8_mha te_fp8_wgrad te_fp8_format "
        "te_fp8_amax_history_len te_fp8_amax_compute_algo te_fp8_margin",
        "transformer-engine is not used",
    ),
    **_refuse(
        "use_mup coord_check save_base_shapes base_shapes_file mup_init_scale mup_attn_temp mup_output_temp "
        "mup_embedding_mult mup_rp_embedding_mult mup_width_scale",
        "there is no µP",
        only=(1, 1.0, 2),
    ),
    **_refuse("soft_prompt_tuning", "there is no tuning of prompts: all weights are trained"),
    **_refuse(
        "autotuning curriculum_learning data_efficiency elasticity compression_training amp scheduler",
        "a feature of DeepSpeed that is not here",
    ),
    **_refuse("train_impl", "there is supervised training alone", only=("normal",)),
    **_refuse("dataset_impl", "there is supervised training alone", only=("gpt2",)),
    **_refuse(
        "train_reward_data_paths valid_reward_data_paths test_reward_data_paths pos_train_data_paths "
        "neg_train_data_paths pos_valid_data_paths neg_valid_data_paths pos_test_data_paths neg_test_data_paths "
        "pos_train_label_data_paths neg_train_label_data_paths pos_valid_label_data_paths neg_valid_label_data_paths "
        "pos_test_label_data_paths neg_test_label_data_paths serve_model_weights",
        "there is supervised training alone",
    ),
    **_ignore(
        "dpo_fp32 dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight kto_beta "
        "reinforce_leave_one_out fp32_reinforce kl_impl kl_div_beta weight_server_port online_dataserver_ips "
        "online_dataserver_ports packing loss_on_targets_only masked_lm_prob mean_noise_span_length "
        "extra_sentinel_tokens",
        "it belongs to a choice that is not made",
    ),
}

BLOCKS: Mapping[str, Mapping[str, Key]] = {
    "optimizer": {"type": _use("text"), "params": _use("block")},
    "optimizer.params": {
        "lr": _use("number", 0.001),
        # Defaults of these depend on the type: see `optimizers`.
        "betas": _use("numbers"),
        "eps": _use("number"),
        "momentum": _use("number"),
        "beta": _use("number"),
        "adam_w_mode": _use("truth"),
        "adamw_mode": _use("truth"),
        "bias_correction": _use("truth", True, only=[True], why="moments are always corrected: leave it out"),
        "amsgrad": _use("truth", False, only=[False], why="GPT-NeoX's own Adam refuses it: leave it out"),
        **_ignore("max_grad_norm", "gradient_clipping says it"),
        **_ignore("set_grad_none fp32_optimizer_states", "it changes no result"),
        **_refuse("weight_decay", "the key weight_decay says it: leave it out here"),
        **_refuse("freeze_step cuda_aware comm_backend_name", "it belongs to OneBitAdam, which is not here yet"),
    },
    "fp16": {
        "enabled": _use("truth"),
        "type": _use("text", choices="fp16 bfloat16"),
        "loss_scale": _use("number", 0),
        "initial_scale_power": _use("whole", 16),
        "loss_scale_window": _use("whole", 1000),
        "hysteresis": _use("whole", 2),
        "min_loss_scale": _use("number", 1),
        "consecutive_hysteresis": _use("truth", False),
        **_ignore("fp16 auto_cast fp16_master_weights_and_grads", "it changes no result"),
    },
    "bf16": {
        "enabled": _use("truth"),
        **_ignore(
            "bf16 loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale", "bfloat16 needs no scale"
        ),
    },
    "zero_optimization": {
        "stage": _use("whole", 0),
        "cpu_offload": _use("truth", False),
        "offload_optimizer": _use("block"),
        **_refuse("offload_param", "parameters stay on the GPU: use offload_optimizer"),
        **_ignore(
            "allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size "
            "contiguous_gradients load_from_fp32_weights round_robin_gradients sub_group_size elastic_checkpoint "
            "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_max_live_parameters "
            "stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save memory_efficient_linear "
            "ignore_unused_parameters cpu_offload_params cpu_offload_use_pin_memory zero_hpz_partition_size",
            "how states are exchanged changes no result",
        ),
    },
    "data_types": {
        "grad_accum_dtype": _use("text", choices="fp32 fp16 bf16", only=["fp32"], why="gradients are added in float32"),
    },
}
