"""Reports of a run's numbers: a row for each step and each evaluation, to every sink that the settings name."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from loguru import logger

from openchatkit.settings import to_json
from openchatkit.training import sinks
from openchatkit.training.config import Settings
from openchatkit.training.curve_names import Row, choose_curves
from openchatkit.training.jumps import JumpFinder
from openchatkit.training.monitor import Monitor
from openchatkit.training.sinks import Sink


def open_sinks(settings: Settings, *, first_step: int, total_steps: int) -> list[Sink]:
    """Return the sinks of a run, metrics.jsonl first. UserError where one cannot be opened; then none stays open."""
    folder = settings.checkpoint_path
    names = settings.train_log_backend.split(",")
    curves = choose_curves(settings.curve_names, seq_length=settings.seq_length)
    opened: list[Sink] = [sinks.MetricsFile(folder, first_step=first_step)]
    try:
        if "wandb" in names:
            opened.append(
                sinks.Wandb(
                    project=settings.project_name,
                    team=settings.wandb_team,
                    group=settings.wandb_group or settings.job_id,
                    name=settings.wandb_run_name,
                    config=to_json(settings),
                    curves=curves,
                )
            )
        if "tensorboard" in names:
            opened.append(sinks.TensorBoard(settings.tensorboard_dir, first_step=first_step, curves=curves))
        if settings.monitor is not None:
            opened.append(Monitor(settings.monitor, folder, total_steps=total_steps))
        if "loguru" in names:
            opened.append(sinks.LogFile(settings.log_dir, total_steps=total_steps))
    except BaseException:
        for sink in opened:
            sink.close()
        raise
    return [*opened, sinks.Console(first_step=first_step, total_steps=total_steps)]


class Reporter:
    """Reports steps and evaluations to some sinks; made on rank 0 only. `jumps` knows the losses before."""

    def __init__(self, sinks: Sequence[Sink], jumps: JumpFinder | None = None) -> None:
        self._sinks, self._jumps = sinks, jumps or JumpFinder()

    def report_step(self, row: Row, *, applied: bool, samples: range) -> None:
        """Report one step, with the keys that `training/README.md` lists.

        `samples` are the numbers of its samples, as `tools/inspect_data.py --first` counts them. A norm or loss that is
        not finite is written as null, since JSON has no NaN and no infinity.
        """
        row = self._jumps.mark(_replace_non_finite(row), samples)
        numbers = f"samples {samples[0]} to {samples[-1]}"
        if not applied:
            why = "the gradient is not finite" if row["trained_tokens"] else "none of its tokens is trained on"
            bad = [name for name, of in row["sources"].items() if of["loss"] is None and of["trained_tokens"]]
            blamed = f", the loss of {', '.join(bad)} neither" if bad else ""
            logger.warning("step {}, {}: {}{}; no weight was changed", row["step"], numbers, why, blamed)
        elif "jump" in row:
            loss, usual, step = row["loss"], row["jump"]["usual_loss"], row["step"]
            how = f"tools/inspect_data.py --checkpoint-path with --step {step} shows them"
            logger.warning("step {}, {}: the loss jumps to {:.3f} from {:.3f}; {}", step, numbers, loss, usual, how)
        for sink in self._sinks:
            sink.add_step(row)

    def report_evaluation(self, row: Row) -> None:
        """Report an evaluation: step, evaluation_loss, evaluation_perplexity, evaluation_tokens, evaluation_sources.

        That of the test data has `test` in place of `evaluation`.
        """
        row = _replace_non_finite(row)
        for sink in self._sinks:
            sink.add_evaluation(row)

    def close(self) -> None:
        """Close all sinks, also after one that fails to."""
        with contextlib.ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)


def _replace_non_finite(value: Any) -> Any:
    """Return a row as JSON can hold it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
