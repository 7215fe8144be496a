"""The settings of `training/dist_clm_train.py`, and what can be checked of them before any rank starts.

Names and meanings are the original kit's where it had them. `step` is one optimizer update; a step trains
batch-size x gradient-accumulate-step x data-group-size rows.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from openchatkit import paths
from openchatkit.cli import natural, positive_float, positive_int
from openchatkit.data.options import DataSettings
from openchatkit.distributed.network import parse_url
from openchatkit.errors import UserError
from openchatkit.settings import Given, SettingsParser, fields, setting
from openchatkit.texts import parse_bool
from openchatkit.training.learning_rates import LearningRateSettings
from openchatkit.training.optimization import OptimizationSettings, fill_constants
from openchatkit.training.save_steps import SaveSteps, parse_growth, parse_steps
from openchatkit.training.schedules import SCHEDULES, check_schedule, resolve_stages
from openchatkit.web import is_loopback

if TYPE_CHECKING:
    import torch

S = TypeVar("S", bound="Settings")

MODEL_TYPES = {"gptneox": "gpt_neox", "gptj": "gptj", "neox": "neox"}

# Flags of the original kit that do nothing here; they are accepted with a warning, so that old scripts run.
IGNORED = {
    "num_heads": "config.json says how many heads there are",
    "dist_backend": "torch.distributed carries everything",
    "cuda_num": "a rank uses one GPU, --cuda-id",
    "debug_mem": "memory is in the log",
    "train_data": "use --task-name",
    "valid_data": "use --evaluation-data",
    "tokenizer_type": "the tokenizer's own files say it",
    "vocab_file": "use --tokenizer-name",
    "vocab_extra_ids": "config.json says the vocabulary's size",
    "make_vocab_size_divisible_by": "config.json says the vocabulary's size",
    "num_iters": "use --total-steps",
    "train_warmup_steps": "use --warmup-steps",
}

# Flags of the original kit that cannot be honoured; giving one is an error that says why.
_SECRET = (
    "a command line and a file of settings are no place for a secret: --checkpoint-upload-prefix takes "
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN from the environment, and nothing else needs one"
)
_REFUSED = {
    "aws_access_key_id": _SECRET,
    "aws_secret_access_key": _SECRET,
    "aws_session_token": _SECRET,
    "event_auth_token": _SECRET,
    "aws_endpoint_url": "set AWS_ENDPOINT_URL in the environment",
    "aws_region": "set AWS_REGION in the environment",
    "event_host": "events are not posted; read metrics.jsonl in --checkpoint-path, or use --train-log-backend wandb",
}

# What of layers is computed again, from nothing to all.
RECOMPUTING = ("none", "selective", "full")

# The places that a run's numbers can go to, besides metrics.jsonl.
BACKENDS = ("print", "loguru", "tensorboard", "wandb")

# What of each layer can have its norm recorded.
NORMS = ("gradients", "parameters", "optimizer-state")

# Each of these sets says one thing in several ways.
_ALTERNATIVES = (
    {"precision", "bf16", "fp16"},
    {"total_steps", "nepochs"},
    {"warmup_steps", "warmup_fraction"},
    {"checkpoint_steps", "num_checkpoints", "checkpoint_growth"},
)


def parse_recomputing(text: str) -> str:
    """Return `--activation-checkpointing`'s value, which was yes or no in the original kit."""
    answer = parse_bool(text)
    value = text.strip().lower() if answer is None else ("full" if answer else "none")
    if value not in RECOMPUTING:
        raise argparse.ArgumentTypeError(f"expected none, full or selective, got {text!r}")
    return value


def parse_backends(text: str) -> str:
    """Return `--train-log-backend`'s names, each once, joined by commas."""
    return _parse_names(text, BACKENDS)


def parse_norms(text: str) -> str:
    """Return `--log-norms`' names, each once, joined by commas."""
    return _parse_names(text, NORMS)


def _parse_names(text: str, known: Sequence[str]) -> str:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not_known := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"expected one or several of {', '.join(known)}, separated by commas, got {not_known[0]!r}"
        )
    return ",".join(names)


def parse_monitor(text: str) -> str:
    """Return `--monitor`'s address as ADDRESS:PORT; it must be one that other machines do not reach."""
    host, _, port = text.strip().rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"expected an address such as 127.0.0.1:8010, got {text!r}")
    if not is_loopback(host):
        raise argparse.ArgumentTypeError(
            f"{text!r} would show the run to other machines without a password: give 127.0.0.1:{port}, and elsewhere "
            f"use ssh -L {port}:127.0.0.1:{port} HOST"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_upload_prefix(text: str) -> str:
    """Return `--checkpoint-upload-prefix`'s address, without a slash at its end."""
    bucket = text.removeprefix("s3://").partition("/")[0]
    if not text.startswith("s3://") or not bucket:
        raise argparse.ArgumentTypeError(f"expected s3://BUCKET/PREFIX, got {text!r}")
    return text.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to start from, and what the user expects of it."""

    title: ClassVar[str] = "model"
    model_name: Path = setting(
        required=True, help="folder of layer shards that a `prepare.py` wrote, or of a GPT-NeoX checkpoint"
    )
    tokenizer_name: Path = setting(help="folder of the tokenizer; not given: `--model-name`")
    model_type: str | None = setting(None, choices=MODEL_TYPES, help="family; checked against the model")
    num_layers: int = setting(
        0, check=natural, help="layers a stage, where the last may have fewer; 0: as `--balance` says"
    )
    embedding_dim: int | None = setting(None, check=positive_int, help="hidden size; checked against the model")
    load_pretrained_model: bool = setting(True, help="`false`: start from random weights")


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The data to train on."""

    title: ClassVar[str] = "data"
    task_name: str = setting(
        required=True,
        help="`SOURCE[:WEIGHT],...`: files, globs, token stores, addresses, data sets of the hub; see `data/README.md`",
    )


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """The ranks, how they meet, and which of them this process is."""

    title: ClassVar[str] = "layout"
    dist_url: str | None = setting("tcp://127.0.0.1:9000", help="where the ranks meet; rank 0 listens there")
    world_size: int = setting(check=positive_int, help="ranks in all; not given: pipeline x data x tensor group size")
    pipeline_group_size: int = setting(1, check=positive_int, help="ranks that share the layers of a model")
    data_group_size: int = setting(1, check=positive_int, help="replicas")
    tensor_group_size: int = setting(
        1, check=positive_int, help="ranks that share each layer; they exchange much, so keep them within a machine"
    )
    sequence_parallel: bool = setting(
        False, help="a rank of a tensor group holds its share of the tokens between layers, which saves memory"
    )
    rank: int = setting(check=natural, help="number of this process; the launcher and torchrun give it")
    cuda_id: int = setting(check=natural, help="GPU of this process; the launcher and torchrun give it")
    use_cuda: bool = setting(True, help="`false`: train on the CPU, as without a GPU")
    net_interface: str | None = setting(
        None, help="network interface to use; not given: gloo and NCCL choose one themselves"
    )
    pp_mode: str = setting(
        "gpipe",
        choices=SCHEDULES,
        help="pipeline schedule; `1f1b` holds fewer micro-batches at a time, `interleaved` lets ranks wait least; the "
        "last two need `--activation-checkpointing none`",
    )
    balance: str = setting(
        "even",
        choices=("even", "auto"),
        help="layers a stage, where `--num-layers` is not given: as many in each, or by what the head costs, which is "
        "measured at the start",
    )
    stages_per_rank: int | None = setting(
        None, check=positive_int, help="runs of layers on each rank; not given: 2 with `interleaved`, else 1"
    )
    dp_mode: str = setting(
        "allreduce",
        choices=("allreduce", "sharded", "sharded-gradients", "sharded-parameters"),
        help="how replicas agree: `allreduce` keeps all of the optimizer's state on each, `sharded` (ZeRO-1) shares it "
        "among them and gives the same weights, `sharded-gradients` (ZeRO-2) also shares gradients, which are then "
        "added up after each micro-batch, `sharded-parameters` (ZeRO-3) shares all, and gathers each layer for as long "
        "as it computes; the last two need `--pipeline-group-size 1`",
    )
    dp_backend: str = setting("nccl", choices=("nccl", "gloo"), help="what carries it; CPUs always use gloo")
    check_replicas: int = setting(
        0,
        check=natural,
        help="compare the weights of replicas after every so many steps and before each checkpoint, and stop where a "
        "bit differs; 0: never",
    )
    timeout: int = setting(1800, check=positive_int, help="seconds to wait for another rank")
    heartbeat_timeout: int = setting(
        60,
        check=positive_int,
        help="seconds without a sign of life of a rank until the run ends; at most `--timeout`, however long a rank "
        "computes",
    )


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How many steps there are, and how the rows of one are put through."""

    title: ClassVar[str] = "steps"
    total_steps: int | None = setting(None, check=positive_int, help="steps in all, those before a resume included")
    nepochs: int | None = setting(
        None,
        check=positive_int,
        help="passes over the data, instead of `--total-steps`; without weights, over every source",
    )
    batch_size: int = setting(32, check=positive_int, help="rows that a replica puts through at once")
    micro_batch_size: int = setting(8, check=positive_int, help="rows of one micro-batch")
    gradient_accumulate_step: int = setting(1, check=positive_int, help="batches a step")
    activation_checkpointing: str = setting(
        "full",
        check=parse_recomputing,
        alone="full",
        help="what of layers to compute again in the backward pass, to save memory: `none`, `full` (all; a layer keeps "
        "its input), or `selective` (all but attention and the products with small results). `true` and `false` stand "
        "for `full` and `none`",
    )
    activation_offload: bool = setting(
        False,
        help="keep the inputs of layers that are computed again in main memory until then; needs "
        "`--activation-checkpointing`, and has no use on CPUs",
    )
    compile: str | None = setting(
        None,
        choices=("inductor", "aot_eager"),
        alone="inductor",
        help="let torch.compile make one program for all layers: `inductor` fuses what is between products (on CPUs by "
        "a C++ compiler); `aot_eager` only traces, to find out what is wrong",
    )
    deterministic: bool = setting(
        False, help="the same bits from every run on GPUs, at some cost in speed; CPUs need no flag for it"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Where and when a run is saved and evaluated."""

    title: ClassVar[str] = "checkpoints and evaluation"
    checkpoint_path: Path = setting(help="where checkpoints go; not given: `model_ckpts/` and the model's name")
    checkpoint_steps: int = setting(0, check=natural, help="steps between checkpoints; 0: one at the end")
    num_checkpoints: int = setting(
        0, check=natural, help="how many checkpoints in all, where `--checkpoint-steps` is not given"
    )
    checkpoint_growth: float | None = setting(
        None,
        check=parse_growth,
        help="save after steps that are ever further apart, instead of `--checkpoint-steps`: 1, 2, 4, 8 and so on with "
        "2, the whole parts of 1, 1.5, 2.25 and so on with 1.5",
    )
    extra_save_steps: str | None = setting(
        None, check=parse_steps, help="steps to save after besides, separated by commas: `10,100`"
    )
    exit_interval: int = setting(
        0,
        check=natural,
        help="save and end with 75 after every so many steps, as after SIGTERM: the same command goes on; 0: never. "
        "`--max-restarts` does not start such a run again",
    )
    keep_checkpoints: int = setting(
        2,
        check=positive_int,
        help="how many stay, besides the last that a step was taken with; older ones are deleted",
    )
    checkpoint_in_background: bool = setting(
        True,
        help="write checkpoints beside the steps that follow, from a copy that takes as much main memory as their "
        "files take on disk; `false`: let steps wait",
    )
    on_full_disk: str = setting(
        "stop",
        choices=("stop", "continue"),
        help="what a run does when a checkpoint finds no room: end with 2, or train on and say so; its last one always "
        "needs room",
    )
    checkpoint_upload_prefix: str | None = setting(
        None,
        check=parse_upload_prefix,
        help="`s3://BUCKET/PREFIX` that finished checkpoints are uploaded to beside the steps; none is deleted here "
        "before it is there. Keys are those of the environment, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    )
    load_checkpoint: bool = setting(True, help="resume from the checkpoint that `latest` names")
    evaluation_data: str | None = setting(None, help="data to evaluate on, written as `--task-name`")
    evaluation_steps: int = setting(0, check=natural, help="steps between evaluations; 0: never")
    evaluation_num_batch: int = setting(10, check=positive_int, help="batches of an evaluation")
    test_data: str | None = setting(
        None, help="data to evaluate on once, after the last step, written as `--task-name`; as many batches"
    )
    character_perplexity: bool = setting(
        False, help="evaluations also say e to the loss of a character, which compares models of other tokenizers"
    )


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Where the numbers and traces of a run go."""

    title: ClassVar[str] = "logging"
    train_log_backend: str = setting(
        "print",
        check=parse_backends,
        help="one or several of `print`, `loguru`, `tensorboard` and `wandb`, separated by commas; `print` is the "
        "console, which is there in any case, `loguru` a file. `metrics.jsonl` is always written",
    )
    log_dir: Path = setting(help="folder of the file that `loguru` writes; not given: `./logs/`")
    log_norms: str | None = setting(
        None,
        check=parse_norms,
        help="one or several of `gradients`, `parameters` and `optimizer-state`, separated by commas, whose norms are "
        "recorded for each layer, the embedding and the head; the last two go through all weights after each step",
    )
    curve_names: str = setting(
        "kit",
        choices=("kit", "neox"),
        help="names of the curves in TensorBoard and wandb: those of `metrics.jsonl`, or GPT-NeoX's, `train/lm_loss`",
    )
    tensorboard_dir: Path = setting(
        help="folder of TensorBoard's files; not given: `tensorboard/` in `--checkpoint-path`"
    )
    project_name: str = setting("openchatkit", help="of the wandb run")
    wandb_team: str | None = setting(None, help="of the wandb run; not given: the user's own")
    wandb_group: str | None = setting(None, help="of the wandb run; not given: `--job-id`")
    wandb_run_name: str | None = setting(None, help="of the wandb run; not given: wandb makes one up")
    job_id: str = setting("0", help="of traces, and of the wandb run")
    monitor: str | None = setting(
        None,
        check=parse_monitor,
        alone="127.0.0.1:8010",
        help="`ADDRESS:PORT` of this machine, at which rank 0 serves a page with the run's pictures while it runs",
    )
    peak_tflops: float | None = setting(
        None,
        check=positive_float,
        help="10^12 operations a second of a GPU or process, of which each step's share is shown; not given: what "
        "large products reach at the start, measured in runs of 20 steps and more",
    )
    profiling: str = setting(
        "no-profiling",
        choices=("no-profiling", "tidy_profiling", "pytorch_profiling"),
        help="`tidy_profiling`: the passes and messages of three steps, in a Chrome trace a rank in `./trace_json/` "
        "and one of all ranks in `--checkpoint-path`; `pytorch_profiling`: all operations, in a trace a rank",
    )
    trace_postfix: str = setting("default", help="of the traces' names")


@dataclass(frozen=True, kw_only=True)
class Settings(
    ModelSettings,
    SourceSettings,
    DataSettings,
    LayoutSettings,
    StepSettings,
    LearningRateSettings,
    OptimizationSettings,
    CheckpointSettings,
    LoggingSettings,
):
    """All settings of a run, complete and consistent. UserError for what cannot work whatever model and data are.

    `ignored` are the names of the given flags that have no effect (see `IGNORED`).
    """

    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_layout()
        self._check_batches()
        if self.total_steps is None and self.nepochs is None:
            raise UserError("give --total-steps N or --nepochs N: how long to train")
        self.check_order(one_pass=self.total_steps is None)
        self.make_rates(self.total_steps)
        if self.checkpoint_growth is not None and (self.checkpoint_steps or self.num_checkpoints):
            raise UserError(
                "--checkpoint-growth says when to save, in place of --checkpoint-steps and --num-checkpoints: leave it "
                "or them out"
            )
        self.check_optimization()
        if self.moments == "8bit" and "optimizer-state" in (self.log_norms or ""):
            raise UserError("--log-norms optimizer-state: state of 8 bits has no norms: leave it, or those bits, out")
        if bool(self.evaluation_steps) != bool(self.evaluation_data):
            raise UserError("--evaluation-steps and --evaluation-data go together: how often, and on what")

    @property
    def recompute(self) -> bool:
        """Whether layers compute anything again in the backward pass."""
        return self.activation_checkpointing != "none"

    @property
    def shares_state(self) -> bool:
        """Whether each replica has a share of the masters and of the optimizer's state alone."""
        return self.dp_mode != "allreduce" and self.data_group_size > 1

    def sends_through_cpu(self, device: "torch.device") -> bool:
        """Whether replicas whose ranks compute on such a device exchange on the CPU nevertheless, by gloo."""
        return device.type == "cuda" and self.dp_backend == "gloo"

    def list_save_steps(self, total_steps: int) -> SaveSteps:
        """Return the steps after which a run of so many is saved, besides the last."""
        every = self.checkpoint_steps
        if not every and self.num_checkpoints:
            every = math.ceil(total_steps / self.num_checkpoints)
        extra = frozenset(map(int, self.extra_save_steps.split(","))) if self.extra_save_steps else frozenset()
        return SaveSteps(every, self.checkpoint_growth, extra)

    @property
    def stages(self) -> int:
        """Number of stages in a pipeline."""
        return self.pipeline_group_size * resolve_stages(self.pp_mode, self.stages_per_rank, self.pipeline_group_size)

    def _check_layout(self) -> None:
        ranks = self.pipeline_group_size * self.data_group_size * self.tensor_group_size
        if self.world_size != ranks:
            raise UserError(
                f"--world-size {self.world_size} is not --pipeline-group-size {self.pipeline_group_size} x "
                f"--data-group-size {self.data_group_size} x --tensor-group-size {self.tensor_group_size} = {ranks}: "
                "make them agree"
            )
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"--rank {self.rank}: ranks of --world-size {self.world_size} are 0 to {self.world_size - 1}"
            )
        resolve_stages(self.pp_mode, self.stages_per_rank, self.pipeline_group_size)
        if self.dist_url is not None:
            parse_url(self.dist_url)
        if self.tensor_group_size > 1 and self.moments == "8bit":
            raise UserError(
                "8-bit optimizer state and --tensor-group-size exclude each other: blocks of it that hold columns of a "
                "part are of no other layout; use --optimizer-state bf16, or stages in place of tensor groups"
            )
        if self.optimizer == "sm3" and (self.tensor_group_size > 1 or self.shares_state):
            other = (
                f"--dp-mode {self.dp_mode}" if self.shares_state else f"--tensor-group-size {self.tensor_group_size}"
            )
            raise UserError(
                f"--optimizer sm3 and {other} exclude each other: it keeps maxima of whole rows and columns, which are "
                "cut there; use replicas with --dp-mode allreduce, stages, or another optimizer"
            )
        if self.check_replicas and self.data_group_size == 1:
            raise UserError("--check-replicas compares replicas, and --data-group-size 1 means one: leave it out")
        if self.sequence_parallel and self.seq_length % self.tensor_group_size:
            raise UserError(
                f"--sequence-parallel: --seq-length {self.seq_length} is not a multiple of --tensor-group-size "
                f"{self.tensor_group_size}: make it one"
            )
        if self.dp_mode == "sharded-gradients" and self.pipeline_group_size > 1:
            raise UserError(
                f"--dp-mode sharded-gradients and --pipeline-group-size {self.pipeline_group_size} exclude each other: "
                "a pipeline has the gradients of several micro-batches at once; use --dp-mode sharded, or one stage"
            )
        if self.dp_mode == "sharded-parameters":
            self._check_sharded_parameters()

    def _check_sharded_parameters(self) -> None:
        """Raise UserError for what replicas that share their parameters cannot do."""
        excluded = {
            f"--pipeline-group-size {self.pipeline_group_size}": (
                self.pipeline_group_size > 1,
                "a pipeline would gather its layers again for every micro-batch; use --dp-mode sharded, or one stage",
            ),
            "8-bit optimizer state": (
                self.moments == "8bit",
                "a block of it is no number of rows; use --optimizer-state bf16, or --dp-mode sharded",
            ),
            "--check-replicas": (
                self.check_replicas > 0,
                "replicas have norms and biases alone in common, a thousandth of the model; leave it out, or use "
                "--dp-mode sharded",
            ),
            "--use-offload": (self.use_offload, "rows are updated in place; leave it out, or use --dp-mode sharded"),
        }
        for other, (is_given, advice) in excluded.items():
            if is_given:
                raise UserError(f"--dp-mode sharded-parameters and {other} exclude each other: {advice}")

    def _check_batches(self) -> None:
        if self.activation_offload and not self.recompute:
            raise UserError(
                "--activation-offload keeps inputs of layers that are computed again: give --activation-checkpointing "
                "full or selective with it"
            )
        if self.batch_size % self.micro_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batch-size {self.micro_batch_size}"
            )
        check_schedule(
            self.pp_mode,
            pipeline_size=self.pipeline_group_size,
            micro_batches=self.batch_size // self.micro_batch_size,
            batch=f"--batch-size {self.batch_size} / --micro-batch-size {self.micro_batch_size}",
            recompute=self.recompute,
            compiled=self.compile is not None,
        )


def build_parser(
    cls: type[Settings] = Settings,
    *,
    prog: str = "dist_clm_train.py",
    description: str = "Fine-tune a model over a pipeline of stages and replicas.",
) -> SettingsParser:
    """Return the parser of every flag of `Settings`, or of a command's that has more."""
    return SettingsParser(
        cls, alternatives=_ALTERNATIVES, unlisted=IGNORED, refused=_REFUSED, prog=prog, description=description
    )


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Read the settings of the command line, of torchrun's environment and of `--config`, in this order.

    UserError for what cannot work whatever the model and the data are.
    """
    return complete(build_parser().read(argv), Settings, environment=os.environ)


def complete(given: Given, cls: type[S], *, environment: Mapping[str, str]) -> S:
    """Return the settings that are given, with defaults for all others; torchrun's are in the environment.

    UserError for what cannot work whatever the model and the data are.
    """
    defaults = {field.name: field.default for field in fields(cls) if field.default is not dataclasses.MISSING}
    values = defaults | {name: value for name, value in given.values.items() if name not in IGNORED}
    _complete_ranks(values, given, environment)
    _complete_precision(values)
    fill_constants(values)
    model = values["model_name"]
    values = {"tokenizer_name": model, "checkpoint_path": paths.MODEL_CKPTS / model.name} | values
    values.setdefault("tensorboard_dir", values["checkpoint_path"] / "tensorboard")
    values.setdefault("log_dir", Path("logs"))
    return cls(**values, ignored=tuple(name for name in IGNORED if name in given.values))


def _complete_ranks(values: dict[str, Any], given: Given, environment: Mapping[str, str]) -> None:
    """Fill in rank, world size, GPU and meeting point where not given; torchrun decides them if it started us."""
    if "RANK" in environment and "rank" not in given.last:
        values["rank"] = _read_number("RANK", environment)
        world_size = _read_number("WORLD_SIZE", environment)
        if values.setdefault("world_size", world_size) != world_size:
            raise UserError(f"--world-size {values['world_size']}, but torchrun started {world_size} ranks")
        # Kubernetes' operators start one rank a pod, and say nothing of local ranks.
        if "cuda_id" not in given.last and "LOCAL_RANK" in environment:
            values["cuda_id"] = _read_number("LOCAL_RANK", environment)
        values["dist_url"] = None
    values.setdefault("rank", 0)
    values.setdefault("cuda_id", 0)
    groups = ("pipeline_group_size", "data_group_size", "tensor_group_size")
    values.setdefault("world_size", math.prod(values[group] for group in groups))


def _read_number(name: str, environment: Mapping[str, str]) -> int:
    """Read the whole number that torchrun, or another launcher, sets beside RANK."""
    text = environment.get(name, "")
    if not text.isdecimal():
        found = f"is {text!r}" if text else "is not set"
        raise UserError(
            f"RANK is set, and {name} {found}: expected a whole number there, as torchrun sets them; or give --rank, "
            "--world-size and --dist-url"
        )
    return int(text)


def _complete_precision(values: dict[str, Any]) -> None:
    """Let --precision stand for --bf16 and --fp16 too; UserError where they say different things."""
    given = {name: flag for name, flag in (("bfloat16", "bf16"), ("float16", "fp16")) if values[flag]}
    if len(given) == 2:
        raise UserError("--fp16 and --bf16 exclude each other: give one of them, or --precision auto")
    for name, flag_given in given.items():
        if values.setdefault("precision", name) != name:
            raise UserError(
                f"--{flag_given} and --precision {values['precision']} exclude each other: give one of them"
            )
    values.setdefault("precision", "float32")


if __name__ == "__main__":
    from openchatkit.settings import update_table

    _readme = paths.ROOT / "training" / "README.md"
    _readme.write_text(update_table(_readme.read_text(encoding="utf-8"), Settings), encoding="utf-8")
