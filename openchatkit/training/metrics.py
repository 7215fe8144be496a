"""Reports of a run's numbers: metrics.jsonl always, one live line on a terminal, and the chosen log backend."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loguru import logger

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats import metrics
from openchatkit.storage import storage_errors
from openchatkit.training.forecast import Forecast

_LOG_FILE = "./logs/file_{time}.log"


def configure_logging(*, rank: int, backend: str) -> None:
    """Send the log to stderr with the rank in front; with `--train-log-backend loguru` rank 0 also writes a file."""
    logger.remove()
    prefix = "{time:HH:mm:ss} | " + (f"rank {rank} | " if rank else "")
    logger.add(progress.write, format=prefix + "{message}", level="INFO" if rank == 0 else "WARNING")
    if backend == "loguru" and rank == 0:
        logger.add(_LOG_FILE, format="{time} | {level} | {message}", level="INFO")


class Reporter:
    """Reports steps and evaluations; made on rank 0 only.

    `first_step` and `total_steps` are the ends of the live line. `config` goes to wandb and holds no secrets. `clock`
    is monotonic, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        total_steps: int,
        backend: str,
        project: str,
        job_id: str,
        config: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.backend = folder, backend
        self._clock = clock
        with storage_errors(folder):
            metrics.cut(folder, first_step)
        self._bar = progress.bar(total_steps, "training", unit="step", initial=first_step)
        self._wandb_run = _start_wandb_run(project, job_id, config) if backend == "wandb" else None
        self._last_printed = 0.0
        self._forecast = Forecast(total_steps, clock=clock)

    def report_step(self, row: dict[str, Any], *, applied: bool, samples: range) -> None:
        """Report one step: step, loss, lr, grad_norm, tokens, tokens_per_second, loss_scale, trained_tokens, sources.

        `samples` are the numbers of its samples, as `tools/inspect_data.py --first` counts them. A norm or loss that is
        not finite is written as null, since JSON has no NaN and no infinity.
        """
        row = _replace_non_finite(row)
        if not applied:
            why = "the gradient is not finite" if row["trained_tokens"] else "none of its tokens is trained on"
            bad = [name for name, of in row["sources"].items() if of["loss"] is None and of["trained_tokens"]]
            blamed = f", the loss of {', '.join(bad)} neither" if bad else ""
            numbers = f"samples {samples[0]} to {samples[-1]}"
            logger.warning("step {}, {}: {}{}; no weight was changed", row["step"], numbers, why, blamed)
        self._append(row)
        loss = _format_number(row["loss"], row["trained_tokens"])
        self._bar.update()
        self._bar.set_postfix(loss=loss, tok_s=f"{row['tokens_per_second']:.0f}", refresh=False)
        self._send(row)
        # On a terminal the live line shows this; in a file, a line every few seconds is enough to follow a run.
        last = row["step"] == self._bar.total
        if self.backend != "print" or (self._bar.disable and (last or self._clock() - self._last_printed > 10)):
            self._last_printed = self._clock()
            logger.info(
                f"step {row['step']}/{self._bar.total} | loss {loss} | lr {row['lr']:.3g} | "
                f"grad norm {_format_number(row['grad_norm'])} | {row['tokens_per_second']:.0f} tokens/s"
            )
        if (forecast := self._forecast.after(row["step"])) is not None:
            logger.info(forecast)

    def report_evaluation(self, row: dict[str, Any]) -> None:
        """Report an evaluation: step, evaluation_loss, evaluation_tokens, evaluation_sources."""
        row = _replace_non_finite(row)
        self._append(row)
        self._send(row)
        loss = _format_number(row["evaluation_loss"], row["evaluation_tokens"])
        logger.info(f"step {row['step']} | evaluation loss {loss}")

    def close(self) -> None:
        """End the live line and the wandb run."""
        self._bar.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()

    def _append(self, row: dict[str, Any]) -> None:
        with storage_errors(self.folder):
            metrics.append(self.folder, row)

    def _send(self, row: dict[str, Any]) -> None:
        if self._wandb_run is not None:
            self._wandb_run.log(_flatten(row), step=row["step"])


def _replace_non_finite(value: Any) -> Any:
    """Return a row as JSON can hold it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for charts: `loss/<source>` in place of nested values."""
    flat = {key: value for key, value in row.items() if key != "step" and not isinstance(value, dict)}
    for key, loss in (("sources", "loss"), ("evaluation_sources", "evaluation_loss")):
        named = {f"{loss}/{name}": source["loss"] for name, source in row.get(key, {}).items()}
        flat |= {name: value for name, value in named.items() if value is not None}
    return flat


def _format_number(value: float | None, trained_tokens: int = 1) -> str:
    if value is None:
        return "not finite" if trained_tokens else "none"
    return f"{value:.4g}"


def _start_wandb_run(project: str, job_id: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--train-log-backend wandb needs wandb: pip install 'openchatkit[wandb]'") from error
    try:
        return wandb.init(project=project, group=job_id, config=config, resume="allow")
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline") from error
