"""`training/dist_clm_train.py`: one process a rank, from flags to a trained checkpoint."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from openchatkit.cli import INTERRUPTED, command
from openchatkit.distributed import network
from openchatkit.distributed.processes import has_ranks_elsewhere
from openchatkit.errors import DEFECT, UserError
from openchatkit.settings import flag
from openchatkit.training import config, device
from openchatkit.training.config import Settings

if TYPE_CHECKING:
    from openchatkit.training.loop import Loop
    from openchatkit.training.setup import RunInputs
    from openchatkit.training.task_scorer import TaskEvaluation

_LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out")
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")


def run(argv: Sequence[str] | None = None, *, evaluate_tasks: "TaskEvaluation | None" = None) -> int:
    """Train until --total-steps, from the newest checkpoint on if there is one. Returns the exit status.

    `evaluate_tasks`, given on all ranks and called on rank 0, is called at each evaluation.
    """
    settings = config.parse(argv)
    if settings.net_interface or settings.world_size > 1:
        host = network.parse_url(settings.dist_url)[0] if settings.dist_url else ""
        network.choose_interface(settings.net_interface, host)
    if settings.use_cuda:
        device.let_cuda_blocks_grow()

    # torch takes seconds to import; --help and mistakes in the flags need not wait for it.
    from openchatkit.training.monitor import check_address
    from openchatkit.training.sinks import check_installed, configure_logging

    configure_logging(rank=settings.rank)
    if settings.rank == 0:
        check_installed(settings.train_log_backend)
        if settings.monitor is not None:
            check_address(settings.monitor)
    with _explain_failures(settings), _prepare_loop(settings, evaluate_tasks) as loop:
        return loop.run()


main = command(run)


@contextlib.contextmanager
def _prepare_loop(settings: Settings, evaluate_tasks: "TaskEvaluation | None") -> Iterator["Loop"]:
    """Open model and data, meet the other ranks, load this rank's stage; leave the others in good order at the end."""
    from openchatkit.distributed import rendezvous, watchdog
    from openchatkit.distributed.layout import make_layout
    from openchatkit.training import checkpoints, fit, setup
    from openchatkit.training.attention_kernels import fastest_attention
    from openchatkit.training.loop import Loop
    from openchatkit.training.prediction import make_prediction
    from openchatkit.training.schedules import SCHEDULES

    if settings.rank == 0:
        _warn_of_ignored_flags(settings)
    if settings.deterministic:
        device.make_deterministic()
    place: dict[str, Any] = {"rank": settings.rank, "device": device.choose_device(settings)}
    margin = watchdog.MARGIN_SECONDS if place["device"].type == "cuda" else 0.0
    place["timeout"] = timedelta(seconds=settings.timeout + margin)
    device.check_compiler(settings, place["device"])
    inputs, problem = _prepare_inputs(settings)
    try:
        if settings.world_size > 1:
            _meet(settings, place, problem)
        assert inputs is not None, problem
        layout = make_layout(
            pipeline_size=settings.pipeline_group_size,
            replicas=settings.data_group_size,
            tensor_size=settings.tensor_group_size,
            join_ends=inputs.shards.config.tie_embeddings and not SCHEDULES[settings.pp_mode].v_shaped,
            **place,
        )
        guard = watchdog.watch(
            layout,
            host=network.parse_url(settings.dist_url)[0] if settings.dist_url else None,
            silence=min(settings.heartbeat_timeout, settings.timeout),
            timeout=settings.timeout,
            advice=_advise_resume(settings),
        )
        with guard, _explain_failures(settings), checkpoints.lock_folder(settings.checkpoint_path, layout):
            checkpoints.check_shared_folder(settings.checkpoint_path, layout)
            inputs = setup.settle_plan(settings, inputs, layout)
            fit.check_run(settings, inputs.plan, layout, total_steps=inputs.total_steps)
            with fastest_attention(settings, inputs.shards.config, layout):
                expected = make_prediction(settings, inputs.plan, layout, total_steps=inputs.total_steps)
                trainer, progress = setup.build_trainer(settings, inputs, layout)
                yield Loop(settings, inputs, trainer, progress, expected, evaluate_tasks=evaluate_tasks)
    except BaseException as error:
        status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else DEFECT
        rendezvous.abandon(error.exit_status if isinstance(error, UserError) else status)
        raise
    rendezvous.disconnect()


def _prepare_inputs(settings: Settings) -> "tuple[RunInputs | None, UserError | None]":
    """Open model and data. A mistake is raised, or returned where ranks of other machines are to hear of it first."""
    from loguru import logger

    from openchatkit.training import setup

    try:
        return setup.prepare_run(settings), None
    except UserError as error:
        if not has_ranks_elsewhere(settings.world_size):
            raise
        logger.error("{}; the ranks of other machines are met first, so that they end as well", error)
        return None, error


def _meet(settings: Settings, place: dict[str, Any], problem: UserError | None) -> None:
    """Meet the other ranks; UserError on all of them if one has a problem."""
    from openchatkit.distributed import rendezvous

    try:
        rendezvous.connect(settings.dist_url, world_size=settings.world_size, **place)
    except UserError as error:
        raise problem or error from error
    rendezvous.share_problem(problem, settings.rank)


def _advise_resume(settings: Settings) -> str:
    return (
        f"; when the cause is mended, the same command resumes from the newest checkpoint in {settings.checkpoint_path}"
    )


def _warn_of_ignored_flags(settings: Settings) -> None:
    from loguru import logger

    for name in settings.ignored:
        logger.warning("{} has no effect: {}", flag(name), config.IGNORED[name])
    if settings.nepochs is not None and settings.total_steps is not None:
        logger.warning("--nepochs has no effect: --total-steps {} is given", settings.total_steps)


@contextlib.contextmanager
def _explain_failures(settings: Settings) -> Iterator[None]:
    """Turn a lost peer or full memory into one line; any other exception is a defect, with its traceback."""
    import torch

    from openchatkit.distributed.watchdog import LostPeer

    try:
        yield
    except RuntimeError as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
            raise UserError(
                f"rank {settings.rank} ran out of GPU memory: use a smaller --micro-batch-size or --seq-length, "
                "--optimizer 8bit-adam, --activation-checkpointing true, or more stages"
            ) from error
        if settings.world_size > 1 and _LOST_PEER.search(str(causes[-1])):
            reason = str(causes[-1]).splitlines()[0][:160]
            raise LostPeer(
                f"rank {settings.rank} lost a peer ({reason}){_advise_resume(settings)}",
                reason=reason,
                timed_out=_TIMED_OUT.search(reason) is not None,
            ) from error
        raise
