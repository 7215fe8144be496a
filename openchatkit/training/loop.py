"""The loop of a run: steps, evaluations and checkpoints, until the end or until some rank is asked to stop."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator

from loguru import logger

from openchatkit.data.dataset import Dataset
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.distributed.processes import ECHO_SECONDS, note_stop
from openchatkit.distributed.watchdog import describe_short_timeout
from openchatkit.errors import RESUMABLE, Interrupted, UserError
from openchatkit.formats import metrics
from openchatkit.training.config import Settings
from openchatkit.training.jumps import JumpFinder
from openchatkit.training.ledger_writer import LedgerWriter
from openchatkit.training.metrics import Reporter, open_sinks
from openchatkit.training.norms import NormMeter
from openchatkit.training.perplexity import count_characters, to_perplexity
from openchatkit.training.prediction import Prediction
from openchatkit.training.replica_check import ReplicaCheck
from openchatkit.training.saving import Saver
from openchatkit.training.setup import RunInputs, RunProgress, collect_state
from openchatkit.training.soundness import Soundness
from openchatkit.training.step import Evaluation, StepResult, Trainer, by_name
from openchatkit.training.task_scorer import StopRequested, TaskEvaluation, TaskScorer
from openchatkit.training.throughput import StepMeter
from openchatkit.training.trace import Profile, open_profile
from openchatkit.training.uploads import Uploader, finish_uploads


class Loop:
    """One rank's way through all steps of a run, which all ranks go together."""

    def __init__(
        self,
        settings: Settings,
        inputs: RunInputs,
        trainer: Trainer,
        progress: RunProgress,
        expected: Prediction | None = None,
        *,
        evaluate_tasks: TaskEvaluation | None = None,
    ) -> None:
        self._expected, self._evaluate_tasks = expected, evaluate_tasks
        self.settings, self.inputs, self.trainer, self.progress = settings, inputs, trainer, progress
        self.total_steps = inputs.total_steps
        self._soundness = Soundness(
            settings.checkpoint_path,
            progress,
            trainer.layout,
            keep=settings.keep_checkpoints,
            uploads_to=settings.checkpoint_upload_prefix,
            max_overflows=settings.max_overflows,
            ends_at_min_scale=settings.end_at_min_loss_scale,
        )
        self._saver = Saver(
            settings.checkpoint_path,
            trainer.weights,
            raw_config=inputs.shards.raw_config,
            tokenizer_from=settings.tokenizer_name,
            in_background=settings.checkpoint_in_background,
            on_full_disk=settings.on_full_disk,
            published=self._add_checkpoint,
        )
        self._norms = NormMeter(trainer.weights, (settings.log_norms or "").split(","))
        self._replica_check = ReplicaCheck(trainer.weights, shares_state=settings.dp_mode != "allreduce")
        self._ledger: LedgerWriter | None = None  # on rank 0 only, as the next two
        self._uploader: Uploader | None = None
        self._reporter: Reporter | None = None
        self._meter: StepMeter | None = None
        self._save_steps = settings.list_save_steps(inputs.total_steps)
        self._save_due = False
        self._exit_due = False
        self._slow_step_warned = False

    def run(self) -> int:
        """Train; returns 0 when all steps are done, 75 when stopped before (a checkpoint is written either way)."""
        if self.progress.step >= self.total_steps:
            if self.trainer.layout.rank == 0:
                logger.info("all {} steps are done: {}", self.total_steps, self.settings.checkpoint_path)
            with stop_requests() as requests, self._open_uploads():
                self._finish_uploads(requests)
            return 0
        saver = contextlib.closing(self._saver)
        with (
            self._open_records(),
            stop_requests() as requests,
            self._open_profile() as profile,
            self._open_uploads(),
            saver,
        ):
            while self.progress.step < self.total_steps:
                started = time.perf_counter()
                result = self.trainer.step(
                    self.progress.step, self.inputs.dataset, stop=bool(requests), saving=self._saver.is_writing
                )
                self._record(result, time.perf_counter() - started)
                if profile is not None:
                    profile.step()
                self._evaluate_if_due()
                self._test_at_end()
                self._put_tasks_if_due(requests)
                if self._comparison_is_due:
                    self._compare_replicas()
                self._save_if_due(result)
                saved = self.progress.saved == self.progress.step
                if (result.stop or (self._exit_due and saved)) and self.progress.step < self.total_steps:
                    return self._report_stop()
            self._finish_uploads(requests)
        self._soundness.check_end()
        return 0

    def _record(self, result: StepResult, seconds: float) -> None:
        """Count a step, and enter it wherever steps are recorded. UserError when too many were in vain."""
        tokens = self.trainer.global_batch * self.settings.seq_length
        self.progress.step += 1
        self.progress.tokens += tokens
        self._soundness.add(
            result, scale_can_fall=self.trainer.scaler.can_fall, sources=[s.name for s in self.inputs.dataset.sources]
        )
        if self._ledger is not None:
            self._ledger.add(self.progress.step, self.trainer.global_batch, result)
        norms = self._norms.measure(result)
        if self._reporter is not None and self._meter is not None:
            row = {
                "step": self.progress.step,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": self.progress.tokens,
                "trained_tokens": result.trained_tokens,
                "loss_scale": self.trainer.scaler.scale,
                **self._meter.measure(seconds, result),
                **norms,
                "sources": by_name(self.inputs.dataset, result.sources),
            }
            last = self.progress.step * self.trainer.global_batch
            samples = range(last - self.trainer.global_batch, last)
            self._reporter.report_step(row, applied=result.applied, samples=samples)
        if self._expected is not None:
            self._expected.add(seconds, saved=self._saver.has_begun)
        self._warn_of_timeout(seconds)
        if self._soundness.is_hopeless:
            self._saver.finish()  # It may be the one to go back to.
        self._soundness.check()

    def _warn_of_timeout(self, seconds: float) -> None:
        """Warn once where a step takes longer than a rank waits for another."""
        warning = describe_short_timeout(self.settings.timeout, seconds)
        layout = self.trainer.layout
        if warning is not None and layout.world_size > 1 and layout.rank == 0 and not self._slow_step_warned:
            logger.warning(warning)
            self._slow_step_warned = True

    def _evaluate_if_due(self) -> None:
        every, evaluation = self.settings.evaluation_steps, self.inputs.evaluation
        if evaluation is None or (self.progress.step % every and self.progress.step < self.total_steps):
            return
        # As in GPT-NeoX, whose order has a share for each: the kit evaluates on the same rows every time.
        before = (self.progress.step - 1) // every if self.settings.data_order == "neox" else 0
        self._evaluate(evaluation, "evaluation", first=before * self.settings.evaluation_num_batch)

    def _test_at_end(self) -> None:
        if self.inputs.test is not None and self.progress.step == self.total_steps:
            self._evaluate(self.inputs.test, "test")

    def _put_tasks_if_due(self, requests: list[int]) -> None:
        """Evaluate tasks, if the run has some, as often as the loss. What fails in one ends no training."""
        every = self.settings.evaluation_steps
        if self._evaluate_tasks is None or (self.progress.step % every and self.progress.step < self.total_steps):
            return
        layout, scorer = self.trainer.layout, TaskScorer(self.trainer, requests)
        layout.activity.begin("evaluation of tasks")
        if layout.rank != 0:
            scorer.serve()
            return
        assert self._reporter is not None, "rank 0 reports"
        try:
            with scorer.asking():
                metrics = self._evaluate_tasks(scorer)
        except StopRequested:
            return
        except UserError as error:
            logger.warning("step {}, tasks are not evaluated: {}", self.progress.step, error)
            return
        self._reporter.report_evaluation({"step": self.progress.step, "eval": metrics})

    def _evaluate(self, dataset: Dataset, name: str, *, first: int = 0) -> None:
        """Evaluate on batches from number `first` on, and report the numbers under `name`."""
        self.trainer.layout.activity.begin("evaluation")
        result = self.trainer.evaluate(dataset, self.settings.evaluation_num_batch, first=first)
        if self._reporter is not None:
            row = {
                "step": self.progress.step,
                f"{name}_loss": result.loss,
                f"{name}_perplexity": result.perplexity,
                f"{name}_tokens": result.trained_tokens,
                f"{name}_sources": by_name(dataset, result.sources),
            }
            if self.settings.character_perplexity:
                row[f"{name}_character_perplexity"] = self._find_character_perplexity(dataset, result, first)
            self._reporter.report_evaluation(row)

    def _find_character_perplexity(self, dataset: Dataset, result: Evaluation, first: int) -> float | None:
        """Return e to the loss of a character, over what has been evaluated; None without any."""
        rows = self.settings.batch_size * self.trainer.layout.replicas
        tokenizer = Tokenizer(self.settings.tokenizer_name)
        characters = count_characters(dataset, tokenizer, first * rows, self.settings.evaluation_num_batch * rows)
        return to_perplexity(result.loss * result.trained_tokens / characters) if characters else None

    def _save_if_due(self, result: StepResult) -> None:
        """Save after the steps that settings say, and at the end. While the weights may not be saved, it stays due.

        A save that all ranks have written gets its name; one that they still write is waited for by the next.
        """
        self._save_due |= self._save_steps.is_due(self.progress.step)
        interval = self.settings.exit_interval
        self._exit_due |= bool(interval) and self.progress.step % interval == 0
        last = result.stop or self._exit_due or self.progress.step == self.total_steps
        if self._save_due or last or not result.saving:
            self._saver.finish()
        if not (self._save_due or last) or not self._soundness.may_save(last=last):
            return
        if not self._comparison_is_due:
            self._compare_replicas()
        if self._ledger is not None:
            self.progress.ledger = self._ledger.sync()
        state = collect_state(self.settings, self.inputs, self.trainer, self.progress)
        self._saver.save(self.progress.step, state, last=last)
        self._save_due = False

    def _add_checkpoint(self, step: int) -> None:
        """Take note of a checkpoint that has just got its name."""
        self._soundness.add_checkpoint(step)
        if self._uploader is not None:
            self._uploader.wake()

    @contextlib.contextmanager
    def _open_uploads(self) -> Iterator[None]:
        """Upload checkpoints from rank 0, those of a run before included, if that is asked for."""
        if self.settings.checkpoint_upload_prefix is None or self.trainer.layout.rank != 0:
            yield
            return
        self._uploader = Uploader(self.settings.checkpoint_path, self.settings.checkpoint_upload_prefix)
        self._soundness.uploads_to = self._uploader.storage
        self._uploader.wake()
        with contextlib.closing(self._uploader) as uploader:
            try:
                yield
            except UserError as error:
                if not isinstance(error, Interrupted):  # The run may have gone back, and others go on from there.
                    uploader.settle_latest()
                raise

    def _finish_uploads(self, requests: list[int]) -> None:
        if self.settings.checkpoint_upload_prefix is not None:
            finish_uploads(self._uploader, self.trainer.layout, requests)
            self._soundness.prune()

    @property
    def _comparison_is_due(self) -> bool:
        every = self.settings.check_replicas
        return bool(every) and self.progress.step % every == 0

    def _compare_replicas(self) -> None:
        """Raise UserError, with the checkpoint to go back to, where replicas have other weights; on all ranks."""
        difference = self._replica_check.find_difference() if self.settings.check_replicas else None
        if difference is not None:
            self._saver.finish()  # Its weights were compared before it was begun.
            raise UserError(
                f"after step {self.progress.step}, {difference}: have the memory and the processor there checked, and "
                f"leave them out until then; {self._soundness.go_back()}"
            )

    def _report_stop(self) -> int:
        """Return the exit status of a stopped run; on rank 0, raise it with a line that says where it stands."""
        note_stop(f"step {self.progress.step}")
        if self.trainer.layout.rank == 0:
            stopped = f"stopped after step {self.progress.step} of {self.total_steps}, which is"
            if self.progress.saved != self.progress.step:
                raise Interrupted(f"{stopped} not saved, its gradient not being finite: {self._soundness.go_back()}")
            raise Interrupted(
                f"{stopped} saved in {self.settings.checkpoint_path}: the same command goes on from there"
            )
        return RESUMABLE

    def _open_profile(self) -> "contextlib.AbstractContextManager[Profile | None]":
        return open_profile(
            self.settings,
            self.trainer.layout,
            self.trainer.pipeline.timer,
            first_step=self.progress.step,
            total_steps=self.total_steps,
        )

    @contextlib.contextmanager
    def _open_records(self) -> Iterator[None]:
        """Keep the run's ledger and report its numbers, on rank 0."""
        self._meter = StepMeter(self.settings, self.trainer, steps=self.total_steps - self.progress.step)
        if self.trainer.layout.rank != 0:
            yield
            return
        folder = self.settings.checkpoint_path
        self._ledger = LedgerWriter(folder, self.progress, self.trainer.layout, self.trainer.schedule)
        sinks = open_sinks(self.settings, first_step=self.progress.step, total_steps=self.total_steps)
        self._reporter = Reporter(sinks, JumpFinder(metrics.read(folder)))
        try:
            yield
        finally:
            self._reporter.close()
            self._ledger.close()


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C, which ask to finish the step, save and stop. A second one kills."""
    received: list[int] = []
    first = math.inf  # in seconds of time.monotonic()

    def receive(number: int, _: object) -> None:
        nonlocal first
        # A signal to all processes of a job reaches a rank twice: directly, and through the launcher.
        if time.monotonic() - first > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first = min(first, time.monotonic())
        received.append(number)

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
