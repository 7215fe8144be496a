"""`training/dist_clm_train.py`: one process a rank, from flags to a trained checkpoint."""

import contextlib
import math
import re
import signal
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from openchatkit.cli import command
from openchatkit.distributed import network
from openchatkit.distributed.processes import ECHO_SECONDS
from openchatkit.errors import RESUMABLE, Interrupted, UserError
from openchatkit.training import config, device
from openchatkit.training.config import Settings

if TYPE_CHECKING:
    from openchatkit.training.ledger_writer import LedgerWriter
    from openchatkit.training.metrics import Reporter
    from openchatkit.training.setup import RunInputs, RunProgress
    from openchatkit.training.step import StepResult, Trainer

# After this many steps in a row whose gradient is not finite, training is not coming back by itself.
_HOPELESS = 20
_LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train until --total-steps, resuming where the newest checkpoint stands. Returns the exit status."""
    settings = config.parse(argv)
    if settings.net_interface or settings.world_size > 1:
        host = network.parse_url(settings.dist_url)[0] if settings.dist_url else ""
        network.choose_interface(settings.net_interface, host)
    if settings.use_cuda:
        device.let_cuda_blocks_grow()

    # torch takes seconds to import; --help and mistakes in the flags need not wait for it.
    from openchatkit.training.metrics import configure_logging

    configure_logging(rank=settings.rank, backend=settings.train_log_backend)
    with _explained(settings):
        return _train(settings)


def _train(settings: Settings) -> int:
    from loguru import logger

    from openchatkit.distributed import rendezvous
    from openchatkit.distributed.layout import make_layout
    from openchatkit.training import checkpoints, setup

    if settings.rank == 0:
        for flag, why in config.ignored_flags(settings).items():
            logger.warning("--{} has no effect: {}", flag, why)
        if settings.nepochs is not None and settings.total_steps is not None:
            logger.warning("--nepochs has no effect: --total-steps {} is given", settings.total_steps)
    if settings.deterministic:
        device.make_deterministic()
    own_device = device.choose_device(settings)
    run = setup.prepare_run(settings)
    timeout = timedelta(seconds=settings.timeout)
    place = {"rank": settings.rank, "device": own_device, "timeout": timeout}
    try:
        if settings.world_size > 1:
            rendezvous.connect(settings.dist_url, world_size=settings.world_size, **place)
        layout = make_layout(stages=settings.pipeline_group_size, replicas=settings.data_group_size, **place)
        with checkpoints.only_run_in(settings.checkpoint_path, layout):
            checkpoints.check_shared_folder(settings.checkpoint_path, layout)
            trainer, progress = setup.build_trainer(settings, run, layout)
            return Loop(settings, run, trainer, progress).run()
    finally:
        rendezvous.disconnect()


class Loop:
    """Steps, evaluations and checkpoints until the end, or until some rank is asked to stop."""

    def __init__(self, settings: Settings, run: "RunInputs", trainer: "Trainer", progress: "RunProgress") -> None:
        self.settings, self.run_data, self.trainer, self.progress = settings, run, trainer, progress
        self.total_steps = run.total_steps
        self._reporter: Reporter | None = None  # on rank 0 only, as the next
        self._ledger: LedgerWriter | None = None
        self._stop = False
        self._asked_to_stop = math.inf  # when, in seconds of time.monotonic()
        self._not_finite = 0  # steps in a row, up to the last one, whose gradient was not finite
        self._hopeless = 0  # of these, those that no lower loss scale could have helped
        self._first_step = progress.step + 1
        self._applied = 0  # steps of this run that changed weights
        self._loss_is_finite = True  # as far as is known
        self._save_due = False
        self._unproven = progress.saved  # the last checkpoint, until a step has been taken with its weights

    def run(self) -> int:
        """Train; returns 0 when all steps are done, 75 when stopped before (a checkpoint is written either way)."""
        from loguru import logger

        from openchatkit.training.device import profiler

        if self.progress.step >= self.total_steps:
            if self.trainer.layout.rank == 0:
                logger.info("all {} steps are done: {}", self.total_steps, self.settings.checkpoint_path)
            return 0
        with self._recording(), self._stopping_on_signals(), profiler(self.settings) as profile:
            while self.progress.step < self.total_steps:
                stop = self._step()
                if profile is not None:
                    profile.step()
                self._evaluate_if_due()
                self._save_if_due(stop)
                if stop and self.progress.step < self.total_steps:
                    return self._stopped()
        return self._finished()

    def _step(self) -> bool:
        from openchatkit.training.step import by_name

        started = time.perf_counter()
        result = self.trainer.step(self.progress.step, self.run_data.dataset, stop=self._stop)
        seconds = time.perf_counter() - started
        tokens = self.trainer.global_batch * self.settings.seq_length
        self.progress.step += 1
        self.progress.tokens += tokens
        self._note(result)
        if self._ledger is not None:
            self._ledger.add(self.progress.step, self.trainer.global_batch, result)
        if self._reporter is not None:
            row = {
                "step": self.progress.step,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": self.progress.tokens,
                "trained_tokens": result.trained_tokens,
                "tokens_per_second": tokens / seconds,
                "loss_scale": self.trainer.scaler.scale,
                "sources": by_name(self.run_data.dataset, result.sources),
            }
            self._reporter.step(row, applied=result.applied)
        if self._hopeless == _HOPELESS:
            raise UserError(
                f"the gradient was not finite for {_HOPELESS} steps in a row, up to step {self.progress.step}: lower "
                f"--lr, use --bf16 instead of --fp16, or look at the data; {self._go_back()}"
            )
        return result.stop

    def _note(self, result: "StepResult") -> None:
        """Keep what a step says of the weights that it was taken with, and of those that it leaves."""
        from openchatkit.formats import checkpoint

        if result.applied:
            self._not_finite, self._hopeless, self._loss_is_finite = 0, 0, True
            self._applied += 1
            if self._unproven is not None:
                proven, self._unproven = self._unproven, None
                self.progress.proven = proven
                if self.trainer.layout.rank == 0:
                    root, keep = self.settings.checkpoint_path, self.settings.keep_checkpoints
                    verified = checkpoint.checkpoint_path(root, proven)
                    checkpoint.prune(root, keep, verified=verified, protected=proven)
        elif result.trained_tokens:
            self._not_finite, self._loss_is_finite = self._not_finite + 1, math.isfinite(result.loss)
            self._hopeless += not (self._loss_is_finite and self.trainer.scaler.can_fall)

    def _go_back(self) -> str:
        """Let the next run start from the last checkpoint that is known to be of use; says which one that is.

        That is the newest where the loss is finite, since no step has made its weights worse; but after so many steps
        in vain that the run ended, it is the last one that a step was taken with.
        """
        from openchatkit.formats import checkpoint

        root, proven = self.settings.checkpoint_path, self.progress.proven
        if self.progress.saved is None:
            return "nothing was saved"
        if self._loss_is_finite and self._hopeless < _HOPELESS:
            newest = checkpoint.checkpoint_path(root, self.progress.saved)
            return f"the same command goes on from {newest}"
        if proven is None:
            return f"nothing in {root} is known to be good"
        if self.trainer.layout.rank == 0 and self.progress.saved != proven:
            checkpoint.point_to(root, proven)
        return (
            f"the same command goes on from {checkpoint.checkpoint_path(root, proven)}, the last one known to be good"
        )

    def _evaluate_if_due(self) -> None:
        from openchatkit.training.step import by_name

        every, evaluation = self.settings.evaluation_steps, self.run_data.evaluation
        if evaluation is None or (self.progress.step % every and self.progress.step < self.total_steps):
            return
        result = self.trainer.evaluate(evaluation, self.settings.evaluation_num_batch)
        if self._reporter is not None:
            row = {
                "step": self.progress.step,
                "evaluation_loss": result.loss,
                "evaluation_tokens": result.trained_tokens,
                "evaluation_sources": by_name(evaluation, result.sources),
            }
            self._reporter.evaluation(row)

    def _save_if_due(self, stop: bool) -> None:
        from openchatkit.training import checkpoints
        from openchatkit.training.setup import state_of

        every = self.settings.checkpoint_steps
        if not every and self.settings.num_checkpoints:
            every = math.ceil(self.total_steps / self.settings.num_checkpoints)
        self._save_due |= bool(every) and self.progress.step % every == 0
        last = stop or self.progress.step == self.total_steps
        if not (self._save_due or last) or not self._may_save(last=last):
            return
        if self._ledger is not None:
            self.progress.ledger = self._ledger.sync()
        checkpoints.save(
            self.settings.checkpoint_path,
            self.progress.step,
            stage=self.trainer.stage,
            optimizer=self.trainer.optimizer,
            layout=self.trainer.layout,
            state=state_of(self.settings, self.run_data, self.trainer, self.progress),
            raw_config=self.run_data.shards.raw_config,
            tokenizer_from=self.settings.tokenizer_name,
            keep=self.settings.keep_checkpoints,
            proven=self.progress.proven,
        )
        self.progress.saved = self._unproven = self.progress.step
        self._save_due = False

    def _may_save(self, *, last: bool) -> bool:
        """Whether the weights may be taken for good: not after a step whose gradient was not finite.

        What is due then waits for the next step. The last step's weights are saved where its loss was finite: they are
        those that it was computed with.
        """
        if self._not_finite == 0:
            return self._applied > 0 or self.progress.saved is not None
        return last and self._loss_is_finite and self._applied > 0

    def _finished(self) -> int:
        """All steps are done. UserError where none changed a weight, or the last ones are not saved."""
        if not self._applied:
            raise UserError(
                f"none of the steps {self._first_step} to {self.progress.step} changed a weight, since no gradient was "
                f"finite or no token trained on: look at the warnings above; {self._go_back()}"
            )
        if self.progress.saved != self.progress.step:
            raise UserError(
                f"the loss of the last {self._not_finite} steps was not finite, so that nothing of them is saved: "
                f"lower --lr, or look at the data; {self._go_back()}"
            )
        return 0

    def _stopped(self) -> int:
        if self.trainer.layout.rank == 0:
            stopped = f"stopped after step {self.progress.step} of {self.total_steps}, which is"
            if self.progress.saved != self.progress.step:
                raise Interrupted(f"{stopped} not saved, its gradient not being finite: {self._go_back()}")
            raise Interrupted(
                f"{stopped} saved in {self.settings.checkpoint_path}: the same command goes on from there"
            )
        return RESUMABLE

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Keep the run's ledger and report its numbers, on rank 0."""
        from openchatkit.training.ledger_writer import LedgerWriter
        from openchatkit.training.metrics import Reporter

        if self.trainer.layout.rank != 0:
            yield
            return
        folder, trainer = self.settings.checkpoint_path, self.trainer
        self._ledger = LedgerWriter(folder, self.progress, trainer.layout, trainer.schedule)
        self._reporter = Reporter(
            folder,
            first_step=self.progress.step,
            total_steps=self.total_steps,
            backend=self.settings.train_log_backend,
            project=self.settings.project_name,
            job_id=self.settings.job_id,
            config=config.recorded(self.settings),
        )
        try:
            yield
        finally:
            self._reporter.close()
            self._ledger.close()

    @contextlib.contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM or Ctrl-C: finish the step, save, stop. All ranks stop at the same step; a second one kills."""

        def ask(number: int, _: object) -> None:
            # Whoever signals all processes of a job reaches a rank twice: directly, and through the launcher.
            if time.monotonic() - self._asked_to_stop > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._asked_to_stop = min(self._asked_to_stop, time.monotonic())
            self._stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _explained(settings: Settings) -> Iterator[None]:
    """Say in one line what a lost peer or full memory means; any other exception is a defect, with its traceback."""
    import torch

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
            raise Interrupted(
                f"rank {settings.rank} lost a peer ({reason}); when the cause is mended, the same command resumes from "
                f"the newest checkpoint in {settings.checkpoint_path}"
            ) from error
        raise
