"""Where the numbers of a run go: its metrics.jsonl, the console, and the log backends that the user has chosen.

Sinks take rows as JSON can hold them, step by step. They exist on rank 0 alone.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from loguru import logger

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats import metrics
from openchatkit.storage import storage_errors
from openchatkit.training.curve_names import Curves, Row, flatten
from openchatkit.training.forecast import Forecast, format_left

_LOG_FILE = "file_{time}.log"
# Records with this key are for the sink that it names alone.
_ONLY = "only"
_SECONDS_BETWEEN_LINES = 10
# Of a line on the console, which has the time of day in front.
_COLUMNS = 100 - len("12:34:56 | ")
_LIVE_LINE = "step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
_LIVE_COLUMNS = 38  # of a live line before its numbers, with a short bar


class Sink(Protocol):
    """A place for the numbers of steps and evaluations."""

    def add_step(self, row: Row) -> None:
        """Take the row of a step."""

    def add_evaluation(self, row: Row) -> None:
        """Take the row of an evaluation."""

    def close(self) -> None:
        """Finish; nothing is added afterwards."""


def configure_logging(*, rank: int) -> None:
    """Send the log to stderr, with the rank in front."""
    logger.remove()
    prefix = "{time:HH:mm:ss} | " + (f"rank {rank} | " if rank else "")
    level = "INFO" if rank == 0 else "WARNING"
    logger.add(progress.write, format=prefix + "{message}", level=level, filter=_keep_for("console"))


class MetricsFile:
    """metrics.jsonl in the folder of a run, of which the rows after `first_step` are dropped at the start."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._folder = folder
        with storage_errors(folder):
            metrics.cut(folder, first_step)

    def add_step(self, row: Row) -> None:
        with storage_errors(self._folder):
            metrics.append(self._folder, row)

    add_evaluation = add_step

    def close(self) -> None:
        """Do nothing: each row is in the file already."""


class Console:
    """One live line on a terminal; elsewhere a line of the log every few seconds, which is enough to follow a run.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, *, first_step: int, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._bar = progress.bar(total_steps, "training", initial=first_step, bar_format=_LIVE_LINE)
        self._forecast = Forecast(total_steps, clock=clock)
        self._last_printed = 0.0

    def add_step(self, row: Row) -> None:
        self._forecast.count(row["step"])
        if not self._bar.disable:
            numbers = format_numbers(row, (self._bar.ncols or 100) - _LIVE_COLUMNS)
            self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update()
        due = row["step"] == self._total_steps or self._clock() - self._last_printed > _SECONDS_BETWEEN_LINES
        if self._bar.disable and due:
            self._last_printed = self._clock()
            line = format_step(row, self._total_steps, left=self._forecast.seconds_left)
            logger.bind(**{_ONLY: "console"}).info(line)
        if (forecast := self._forecast.describe()) is not None:
            logger.info(forecast)

    def add_evaluation(self, row: Row) -> None:
        logger.info(format_evaluation(row))

    def close(self) -> None:
        """End the live line."""
        self._bar.close()


class LogFile:
    """A file in a folder with a line for every step, and all else that rank 0 logs."""

    def __init__(self, folder: Path, *, total_steps: int) -> None:
        self._total_steps = total_steps
        with storage_errors(folder):
            self._handler = logger.add(
                folder / _LOG_FILE, format="{time} | {level} | {message}", level="INFO", filter=_keep_for("file")
            )

    def add_step(self, row: Row) -> None:
        logger.bind(**{_ONLY: "file"}).info(format_step(row, self._total_steps))

    def add_evaluation(self, row: Row) -> None:
        """Do nothing: the console logs it for both."""

    def close(self) -> None:
        logger.remove(self._handler)


class TensorBoard:
    """Event files that TensorBoard reads; those of steps after `first_step` are hidden there.

    `curves` names the curves of a row, here and in `Wandb`.
    """

    def __init__(self, folder: Path, *, first_step: int, curves: Curves = flatten) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._curves = curves
        with storage_errors(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add_step(self, row: Row) -> None:
        for name, value in self._curves(row).items():
            self._writer.add_scalar(name, value, row["step"])

    add_evaluation = add_step

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run on wandb's server, or with WANDB_MODE=offline in ./wandb/. `config` must hold no secrets."""

    def __init__(
        self,
        *,
        project: str,
        team: str | None,
        group: str,
        name: str | None,
        config: dict[str, Any],
        curves: Curves = flatten,
    ) -> None:
        import wandb

        self._curves = curves
        try:
            self._run = wandb.init(project=project, entity=team, group=group, name=name, config=config, resume="allow")
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline") from error

    def add_step(self, row: Row) -> None:
        self._run.log(self._curves(row), step=row["step"])

    add_evaluation = add_step

    def close(self) -> None:
        self._run.finish()


def check_installed(backends: str) -> None:
    """Raise UserError where a backend of `--train-log-backend` needs a package that is not installed."""
    for package in ("tensorboard", "wandb"):
        if package in backends.split(",") and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--train-log-backend {package} needs {package}, which is not installed: "
                f"pip install 'openchatkit[{package}]'"
            )


def format_step(row: Row, total_steps: int, *, left: float | None = None) -> str:
    """Return the line of a step, of at most 89 columns."""
    time_left = "" if left is None else f" {format_left(left)} left"
    head = f"step {row['step']}/{total_steps}{time_left} | "
    return head + format_numbers(row, _COLUMNS - len(head))


def format_numbers(row: Row, columns: int) -> str:
    """Return a step's numbers; what does not fit into so many columns is left out, the least important first."""
    norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3g}"
    line = f"loss {_format_loss(row)} lr {row['lr']:.2g} norm {norm} | {_format_speed(row)}"
    shares = {"data": row.get("data_seconds"), "wait": row.get("receive_seconds")}
    percents = {
        name: f"{name} {share:.0%}" for name, of in shares.items() if of and (share := of / row["seconds"]) >= 0.005
    }
    share, memory = row.get("hardware_share"), row.get("memory_bytes")
    extras = [
        f"MFU {share:.0%}" if share else "",
        percents.get("wait", ""),
        percents.get("data", ""),
        f"{memory / 1e9:.1f} GB" if memory else "",
    ]
    for extra in filter(None, extras):
        if len(line) + 1 + len(extra) <= columns:
            line += f" {extra}"
    return line


def format_evaluation(row: Row) -> str:
    """Return the line of an evaluation, of the loss or of tasks."""
    if "eval" in row:
        metrics = (f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in row["eval"].items())
        return f"step {row['step']} | {', '.join(metrics)}"
    name = "test" if "test_tokens" in row else "evaluation"
    loss, perplexity = row[f"{name}_loss"], row.get(f"{name}_perplexity")
    if loss is None:
        return f"step {row['step']} | {name} loss {'not finite' if row[f'{name}_tokens'] else 'none'}"
    return f"step {row['step']} | {name} loss {loss:.4g}" + (f" perplexity {perplexity:.4g}" if perplexity else "")


def _format_loss(row: Row) -> str:
    if row["loss"] is None:
        return "not finite" if row["trained_tokens"] else "none"
    return f"{row['loss']:.4g}"


def _format_speed(row: Row) -> str:
    speed = row["tokens_per_second"]
    return f"{speed:.0f} tok/s" if speed < 1e5 else f"{speed / 1000:.0f}k tok/s"


def _keep_for(sink: str) -> Callable[[Any], bool]:
    """Return a filter of the log that drops what is for another sink alone."""
    return lambda record: record["extra"].get(_ONLY, sink) == sink
