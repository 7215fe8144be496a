"""The flags of `training/dist_clm_train.py`: their names, defaults, and what can be checked before any rank starts.

Names and meanings are the original kit's where it had them. `step` is one optimizer update; a step trains
batch-size x gradient-accumulate-step x data-group-size rows.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from openchatkit import paths
from openchatkit.cli import Parser, below_one, natural, non_negative_float, positive_float, positive_int, truth
from openchatkit.data import options
from openchatkit.distributed.network import parse_url
from openchatkit.errors import UserError
from openchatkit.settings import add_flags, fields

Settings = argparse.Namespace

MODEL_TYPES = {"gptneox": "gpt_neox", "gptj": "gptj"}

# Flags of the original that do nothing here; each is accepted, and said to do nothing, so that old scripts run.
IGNORED = {
    "num-heads": "config.json says how many heads there are",
    "dist-backend": "torch.distributed carries everything",
    "cuda-num": "a rank uses one GPU, --cuda-id",
    "debug-mem": "memory is in the log",
    "train-data": "use --task-name",
    "valid-data": "use --evaluation-data",
    "tokenizer-type": "the tokenizer's own files say it",
    "vocab-file": "use --tokenizer-name",
    "vocab-extra-ids": "config.json says the vocabulary's size",
    "make-vocab-size-divisible-by": "config.json says the vocabulary's size",
    "num-iters": "use --total-steps",
    "train-warmup-steps": "use --warmup-steps",
}

# Flags of the original that cannot be honoured; giving one is an error that says why.
REFUSED = {
    "aws-access-key-id": "a secret on the command line is seen by everyone on the machine",
    "aws-secret-access-key": "a secret on the command line is seen by everyone on the machine",
    "aws-session-token": "a secret on the command line is seen by everyone on the machine",
    "event-auth-token": "a secret on the command line is seen by everyone on the machine",
    "aws-endpoint-url": "checkpoints are not uploaded; copy the folder that --checkpoint-path names",
    "aws-region": "checkpoints are not uploaded; copy the folder that --checkpoint-path names",
    "checkpoint-upload-prefix": "checkpoints are not uploaded; copy the folder that --checkpoint-path names",
    "event-host": "events are not posted; read metrics.jsonl in --checkpoint-path, or use --train-log-backend wandb",
    "use-offload": "optimizer state stays on the device; --optimizer 8bit-adam needs a quarter of the memory",
}


def build_parser() -> Parser:
    """The parser of every flag."""
    parser = Parser(prog="dist_clm_train.py", description="Fine-tune a model over a pipeline of stages and replicas.")
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_layout(parser.add_argument_group("layout"))
    _add_optimization(parser.add_argument_group("optimization"))
    _add_checkpoints(parser.add_argument_group("checkpoints and evaluation"))
    _add_logging(parser.add_argument_group("logging"))
    for flag in (*IGNORED, *REFUSED):
        parser.add_argument(f"--{flag}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Parse and check the flags; UserError for what cannot work whatever the model and the data are."""
    settings = build_parser().parse_args(argv)
    for flag, reason in REFUSED.items():
        if hasattr(settings, flag.replace("-", "_")):
            raise UserError(f"--{flag}: {reason}")
    _complete_from_environment(settings)
    ranks = settings.pipeline_group_size * settings.data_group_size
    if settings.world_size != ranks:
        raise UserError(
            f"--world-size {settings.world_size} is not --pipeline-group-size {settings.pipeline_group_size} x "
            f"--data-group-size {settings.data_group_size} = {ranks}: make them agree"
        )
    if not 0 <= settings.rank < settings.world_size:
        raise UserError(
            f"--rank {settings.rank}: ranks of --world-size {settings.world_size} are 0 to {settings.world_size - 1}"
        )
    if settings.dist_url is not None:
        parse_url(settings.dist_url)
    if settings.batch_size % settings.micro_batch_size:
        raise UserError(
            f"--batch-size {settings.batch_size} is not a multiple of --micro-batch-size {settings.micro_batch_size}"
        )
    micro_batches = settings.batch_size // settings.micro_batch_size
    if settings.pp_mode == "1f1b" and micro_batches < settings.pipeline_group_size:
        raise UserError(
            f"--pp-mode 1f1b needs at least as many micro-batches as stages: --batch-size {settings.batch_size} / "
            f"--micro-batch-size {settings.micro_batch_size} = {micro_batches}, "
            f"--pipeline-group-size {settings.pipeline_group_size}; use smaller micro-batches or --pp-mode gpipe"
        )
    if settings.dp_mode != "allreduce":
        raise UserError(f"--dp-mode {settings.dp_mode} would let replicas drift apart; use --dp-mode allreduce")
    if settings.total_steps is None and settings.nepochs is None:
        raise UserError("give --total-steps N or --nepochs N: how long to train")
    _complete_precision(settings)
    if settings.min_loss_scale > settings.initial_loss_scale:
        raise UserError(
            f"--min-loss-scale {settings.min_loss_scale:g} is above --initial-loss-scale "
            f"{settings.initial_loss_scale:g}: make it smaller"
        )
    if bool(settings.evaluation_steps) != bool(settings.evaluation_data):
        raise UserError("--evaluation-steps and --evaluation-data go together: how often, and on what")
    return settings


def ignored_flags(settings: Settings) -> dict[str, str]:
    """The flags given that do nothing, each with what to use instead."""
    return {flag: why for flag, why in IGNORED.items() if hasattr(settings, flag.replace("-", "_"))}


def recorded(settings: Settings) -> dict[str, object]:
    """The settings as JSON for a checkpoint or a logger. There is no secret among them: none is accepted."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(settings).items())}


def _complete_from_environment(settings: Settings) -> None:
    """Fill rank, world size and meeting point that were not given: from torchrun if it started us, else defaults."""
    launched = "RANK" in os.environ and settings.rank is None
    if launched:
        settings.rank = _number_in("RANK")
        world_size = _number_in("WORLD_SIZE")
        if settings.world_size not in (None, world_size):
            raise UserError(f"--world-size {settings.world_size}, but torchrun started {world_size} ranks")
        settings.world_size = world_size
        # Kubernetes' operators start one rank a pod, and say nothing of local ranks.
        if settings.cuda_id is None and "LOCAL_RANK" in os.environ:
            settings.cuda_id = _number_in("LOCAL_RANK")
        settings.dist_url = None
    settings.rank = settings.rank or 0
    settings.cuda_id = settings.cuda_id or 0
    if settings.world_size is None:
        settings.world_size = settings.pipeline_group_size * settings.data_group_size
    name = str(settings.model_name).rstrip("/")
    settings.tokenizer_name = settings.tokenizer_name or Path(name)
    settings.checkpoint_path = settings.checkpoint_path or paths.MODEL_CKPTS / Path(name).name


def _number_in(name: str) -> int:
    """The whole number in a variable that torchrun, or what stands in for it, sets beside RANK."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        found = f"is {text!r}" if text else "is not set"
        raise UserError(
            f"RANK is set, and {name} {found}: expected a whole number there, as torchrun sets them; or give --rank, "
            "--world-size and --dist-url"
        )
    return int(text)


def _complete_precision(settings: Settings) -> None:
    """Let --precision stand for --bf16 and --fp16 too; UserError where they say different things."""
    given = {name: flag for name, flag in (("bfloat16", "bf16"), ("float16", "fp16")) if getattr(settings, flag)}
    if len(given) == 2:
        raise UserError("--fp16 and --bf16 exclude each other: give one of them, or --precision auto")
    for name, flag in given.items():
        if settings.precision not in (None, name):
            raise UserError(f"--{flag} and --precision {settings.precision} exclude each other: give one of them")
        settings.precision = name
    settings.precision = settings.precision or "float32"


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model-name", type=Path, required=True, help="folder of layer shards that a prepare.py wrote")
    group.add_argument("--tokenizer-name", type=Path, help="folder of the tokenizer (default: --model-name)")
    group.add_argument("--model-type", choices=MODEL_TYPES, help="family; checked against config.json")
    group.add_argument("--num-layers", type=natural, default=0, help="layers a stage, the last may have fewer; 0: even")
    group.add_argument("--embedding-dim", type=positive_int, help="hidden size; checked against config.json")
    group.add_argument("--load-pretrained-model", type=truth, default=True, help="false: start from random weights")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--task-name", required=True, help="SOURCE[:WEIGHT],...: see data/README.md")
    add_flags(group, fields(options.DataSettings))


def _add_layout(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dist-url", default="tcp://127.0.0.1:9000", help="where the ranks meet; rank 0 listens there")
    group.add_argument("--world-size", type=positive_int, help="ranks in all (default: stages x replicas)")
    group.add_argument("--pipeline-group-size", type=positive_int, default=1, help="stages")
    group.add_argument("--data-group-size", type=positive_int, default=1, help="replicas")
    group.add_argument("--rank", type=natural, help="of this process (default: torchrun's, else 0)")
    group.add_argument("--cuda-id", type=natural, help="GPU of this process (default: torchrun's, else 0)")
    group.add_argument("--use-cuda", type=truth, default=True, help="false, or no CUDA: train on the CPU")
    group.add_argument("--net-interface", help="network interface to use (default: gloo's and NCCL's own choice)")
    group.add_argument("--pp-mode", choices=("gpipe", "1f1b"), default="gpipe", help="pipeline schedule")
    group.add_argument("--dp-mode", default="allreduce", help="how replicas agree: allreduce")
    group.add_argument(
        "--dp-backend", choices=("nccl", "gloo"), default="nccl", help="what carries it; CPU: always gloo"
    )
    group.add_argument("--timeout", type=positive_int, default=1800, help="seconds to wait for a peer before giving up")


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--optimizer", choices=("adam", "adamw", "8bit-adam"), default="adamw")
    group.add_argument("--lr", type=non_negative_float, default=1e-5, help="peak learning rate")
    group.add_argument("--warmup-steps", type=natural, default=0, help="steps of linear rise; then it falls to 0")
    group.add_argument("--total-steps", type=positive_int, help="steps in all, those before a resume included")
    group.add_argument("--nepochs", type=positive_int, help="passes over the data, instead of --total-steps")
    group.add_argument("--batch-size", type=positive_int, default=32, help="rows a replica puts through at once")
    group.add_argument("--micro-batch-size", type=positive_int, default=8, help="rows of one micro-batch")
    group.add_argument("--gradient-accumulate-step", type=positive_int, default=1, help="batches a step")
    group.add_argument("--adam-beta1", type=below_one, default=0.9)
    group.add_argument("--adam-beta2", type=below_one, default=0.999)
    group.add_argument("--adam-eps", type=non_negative_float, default=1e-6)
    group.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="of matrices")
    group.add_argument("--max-grad-norm", type=non_negative_float, default=1.0, help="clip the model's norm; 0: never")
    group.add_argument("--activation-checkpointing", type=truth, default=True, help="recompute layers in backward")
    group.add_argument("--deterministic", action="store_true", help="the same bits from every run on GPUs; slower")
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of products; auto: bfloat16 where every rank's hardware computes in it, else float32 (default: float32)",
    )
    group.add_argument("--bf16", action="store_true", help="the same as --precision bfloat16")
    group.add_argument("--fp16", action="store_true", help="the same as --precision float16, with a loss scale")
    group.add_argument("--loss-scale", type=non_negative_float, default=0, help="fixed loss scale for fp16; 0: dynamic")
    group.add_argument("--initial-loss-scale", type=positive_float, default=32768)
    group.add_argument("--min-loss-scale", type=positive_float, default=1)
    group.add_argument("--loss-scale-window", type=positive_int, default=1000, help="good steps before it doubles")
    group.add_argument("--hysteresis", type=positive_int, default=2, help="overflows before it halves")


def _add_checkpoints(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--checkpoint-path", type=Path, help="folder (default: model_ckpts/ and the model's name)")
    group.add_argument("--checkpoint-steps", type=natural, default=0, help="steps between checkpoints; 0: at the end")
    group.add_argument("--num-checkpoints", type=natural, default=0, help="how many in all, if not --checkpoint-steps")
    group.add_argument("--keep-checkpoints", type=positive_int, default=2, help="older ones are deleted")
    group.add_argument("--load-checkpoint", type=truth, default=True, help="resume from the newest checkpoint")
    group.add_argument("--evaluation-data", help="like --task-name")
    group.add_argument("--evaluation-steps", type=natural, default=0, help="steps between evaluations; 0: never")
    group.add_argument("--evaluation-num-batch", type=positive_int, default=10, help="batches of an evaluation")


def _add_logging(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train-log-backend", choices=("print", "loguru", "wandb"), default="print")
    group.add_argument("--project-name", default="openchatkit", help="of the wandb run")
    group.add_argument("--job-id", default="0", help="of the wandb run and the traces")
    profiles = ("no-profiling", "tidy_profiling", "pytorch_profiling")
    group.add_argument("--profiling", choices=profiles, default="no-profiling", help="write a Chrome trace a rank")
    group.add_argument("--trace-postfix", default="default", help="of the traces' names in ./trace_json/")
