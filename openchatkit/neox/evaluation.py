"""`neox/eval.py`, also `eval_tasks/run.py`: the tasks of a GPT-NeoX configuration, put to its checkpoint by lm-eval.

Owns which tasks and what is written; the evaluation is `tools/evaluation`'s, in one process.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.neox import arguments, hosts, key_tables, trained
from openchatkit.neox.config import NeoxConfig
from openchatkit.neox.translation import TrainerRun
from openchatkit.storage import check_writable, storage_errors, write_text

if TYPE_CHECKING:
    from openchatkit.training.task_scorer import TaskEvaluation, TaskScorer

# GPT-NeoX's, where a configuration names none.
DEFAULT_TASKS = ("lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa", "triviaqa")
_KEYS = {*key_tables.GENERATION, *key_tables.REFUSED, "eval_tasks"}
_ROWS = 8  # at a time, where no micro-batch is given


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as GPT-NeoX's configuration files say."""
    parser = arguments.ConfigurationParser(
        prog="neox/eval.py",
        usage="%(prog)s [-d DIR] CONF... [--eval_tasks TASK ...] [--eval_results_prefix TEXT] [--iteration N]",
        description="Evaluate the model that GPT-NeoX's configuration files describe, from its checkpoint, by lm-eval.",
    )
    parser.add_files()
    evaluate(arguments.parse(parser, argv).read_config())


def evaluate(config: NeoxConfig) -> None:
    """Evaluate without examples, print the table, and write results and configuration to a file of the time."""
    config.check(among=_KEYS)
    path = trained.find_trained(config)
    output = _find_output(config, datetime.datetime.now())
    from loguru import logger

    from openchatkit.tools.evaluation import harness

    with trained.open_tokenizer(config, path) as tokenizer:
        results = harness.evaluate(
            str(path),
            config.get("eval_tasks") or DEFAULT_TASKS,
            tokenizer=tokenizer,
            num_fewshot=0,
            batch_size=config.get("train_micro_batch_size_per_gpu") or _ROWS,
            include_paths=_read_include_paths(config),
            dtype=config.precision if hosts.count_gpus() else "auto",
        )
    harness.print_results(results)
    with storage_errors(output, every=True):
        write_text(output, json.dumps({**results, "config": _settings(config)}, indent=2, ensure_ascii=False) + "\n")
    logger.info(f"the results are in {output}")


def prepare_tasks(config: NeoxConfig, run: TrainerRun, *, is_first: bool) -> "TaskEvaluation":
    """Return what puts `eval_tasks` to the model at each evaluation of a training.

    The first rank loads them now, so that a mistake in them is found at once.
    """
    if not run.flags.get("evaluation_steps"):
        raise UserError(
            f"{config.where('eval_tasks')}: tasks are evaluated with the loss, which is not: give eval_iters above 0, "
            "and data to evaluate it on"
        )
    if not is_first:
        return _leave_to_the_first
    from openchatkit.tools.evaluation import harness

    tokenizer = Path(run.flags.get("tokenizer_name") or run.flags["model_name"])
    return harness.load_evaluation(config.get("eval_tasks"), tokenizer, include_paths=_read_include_paths(config))


def _leave_to_the_first(scorer: "TaskScorer") -> dict[str, float]:
    raise AssertionError("the first rank alone puts the tasks")


def _read_include_paths(config: NeoxConfig) -> list[Path]:
    """Return the folders of tasks that are not lm-eval's own, `eval_include_paths`, a key of the kit."""
    return [Path(path) for path in config.get("eval_include_paths") or []]


def _find_output(config: NeoxConfig, now: datetime.datetime) -> Path:
    """Return the file of the results, whose name GPT-NeoX has made so; UserError where it cannot be written."""
    prefix = config.get("eval_results_prefix")
    path = Path(f"{prefix}_" * bool(prefix) + f"eval_results_{now:%m-%d-%Y-%H-%M-%S}.json")
    if path.parent.is_file():
        raise UserError(f"{config.where('eval_results_prefix')}: {path.parent} is a file: expected a folder")
    check_writable(path)
    return path


def _settings(config: NeoxConfig) -> dict[str, Any]:
    return {name: given.value for name, given in config.given.items()}
