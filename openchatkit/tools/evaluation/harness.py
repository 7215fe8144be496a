"""The command that evaluates a model with lm-eval: which tasks, on what, and the table and the file that come out.

The tasks, their data and their metrics are lm-eval's, or files of one's own in its format. `loading` finds and loads
the model; `scoring` makes one of ours answer. With local tasks, data and model, nothing is asked of the network.
"""

import contextlib
import difflib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, hf_model
from openchatkit.loading import hardware, model_kinds, pretrained, stages
from openchatkit.storage import write_text
from openchatkit.tools.evaluation import scoring

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from openchatkit.training.task_scorer import TaskEvaluation, TaskScorer

_INSTALL = "pip install 'openchatkit[eval]'"


@dataclass(frozen=True)
class MetricValue:
    """One line of the table. `stderr` is None where the metric has none."""

    task: str
    metric: str
    value: float
    stderr: float | None


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    tokenizer: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_paths: Sequence[Path] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model on tasks; returns lm-eval's results as plain JSON, with the model, its kind, device and dtype.

    UserError when lm-eval is not installed, a task or its data is not found, or there is no such model.
    """
    _import_lm_eval()
    # All that can be wrong with the flags comes before the weights are read.
    path = _fetch(model)
    place = hardware.choose_device(device)
    parameters = model_kinds.read_live(path, stages.count_parameters)
    precision = hardware.choose_dtype(dtype, place, parameters=parameters, flag="--dtype")
    if dtype != "auto" and (note := hardware.emulation_note(place, precision)):
        from loguru import logger

        logger.warning(note)
    with _silence_libraries():
        chosen = _load_tasks(tasks, include_paths)
        try:
            found, lm = model_kinds.read_live(
                path, lambda found: (found, _load_lm(found, tokenizer, precision, place, batch_size))
            )
            results = _put(chosen, lm, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size)
        except (RuntimeError, MemoryError) as error:
            from openchatkit.inference.engine.engine import is_out_of_memory

            if is_out_of_memory(error):
                raise UserError(
                    f"{model} on {place}: out of memory; pass a smaller --batch-size than {batch_size}, or --dtype "
                    "bfloat16"
                ) from error
            raise
    about = {"model": model, "kind": found.kind, "folder": str(found.path), "device": str(place)}
    relevant = {key: results[key] for key in _RELEVANT if key in results}
    return json.loads(json.dumps({**about, "dtype": str(precision).removeprefix("torch."), **relevant}, default=str))


def load_evaluation(tasks: Sequence[str], tokenizer: Path, *, include_paths: Sequence[Path] = ()) -> "TaskEvaluation":
    """Return what puts tasks, without examples, to a model in training: metrics by `TASK_METRIC`.

    Tasks, their data and the tokenizer in a folder are loaded now. UserError as `evaluate`, and later for whatever is
    wrong in a task: it must end no training.
    """
    _import_lm_eval()
    with _silence_libraries():
        chosen, loaded = _load_tasks(tasks, include_paths), pretrained.load_tokenizer(tokenizer)

    def put(scorer: "TaskScorer") -> dict[str, float]:
        # The seeds of the process are the caller's.
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
        try:
            with _silence_libraries():
                results = _put(chosen, scoring.as_lm(scorer, loaded), num_fewshot=0, **seeds)
        except (ArithmeticError, AttributeError, OSError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"lm-eval failed at these tasks: {reason}") from error
        return {f"{one.task}_{one.metric}": one.value for one in list_values(results)}

    return put


@dataclass(frozen=True)
class _LoadedTasks:
    """Tasks and groups of lm-eval, with their data."""

    manager: "TaskManager"
    tasks: list[Any]


def _put(chosen: _LoadedTasks, lm: "LM", **options: Any) -> dict[str, Any]:
    """Return lm-eval's results of tasks that a model was put; UserError where they do not fit it."""
    import jinja2
    import lm_eval

    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=lm, tasks=chosen.tasks, log_samples=False, task_manager=chosen.manager, **options
        )
    except (ValueError, AssertionError, LookupError, jinja2.TemplateError) as error:
        # More shots than there are examples, more text to generate than the context holds, and the like.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"lm-eval cannot put these tasks to this model: {reason}") from error
    return results


# Of what lm-eval returns; the rest is about the machine.
_RELEVANT = ("results", "groups", "higher_is_better", "n-shot", "n-samples", "versions", "configs", "date")


def list_values(results: Mapping[str, Any]) -> list[MetricValue]:
    """List the numbers of `evaluate`'s results, task by task."""
    listed = []
    for task, entry in results["results"].items():
        for key, value in entry.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = entry.get(f"{metric}_stderr,{rule}")
            name = metric if rule == "none" else f"{metric} ({rule})"
            listed.append(MetricValue(task, name, value, stderr if isinstance(stderr, (int, float)) else None))
    return listed


def _fetch(model: str) -> Path:
    """Return the folder of a model, fetched from the hub if there is none; a checkpoint's step is looked up later."""
    path = Path(model).expanduser()
    return path if path.is_dir() or checkpoint.parse_step(path.name) is not None else hf_model.fetch(model)


def _import_lm_eval() -> None:
    # lm-eval's log goes to the terminal unless this variable is set.
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    try:
        import accelerate  # noqa: F401 - what lm-eval loads Hugging Face models with
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"evaluation needs {error.name or 'lm_eval'}, which is not installed: {_INSTALL}") from error


@contextlib.contextmanager
def _silence_libraries() -> Iterator[None]:
    """Keep the libraries' notes off the terminal, with their bars unless stderr is one, and report nothing."""
    import datasets

    from openchatkit.libraries import hf_transformers

    hf_transformers.silence()
    datasets.disable_progress_bars()
    # Else every local file that is opened is reported to the hub.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _task_manager(include_paths: Sequence[Path]) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    for path in include_paths:
        if not path.is_dir():
            raise UserError(f"--include-path {path} is not a folder: expected one that holds task files (*.yaml)")
    try:
        return TaskManager(include_path=list(include_paths) or None)
    except Exception as error:  # a YAML file can be wrong in many ways
        raise UserError(f"the task files in {', '.join(map(str, include_paths))} cannot be read: {error}") from error


def _match_tasks(tasks: Sequence[str], manager: "TaskManager") -> list[str]:
    """Return the tasks, groups and tags that these names and patterns (`mmlu_*`) mean; UserError for an unknown one."""
    names: list[str] = []
    for task in tasks:
        matched = manager.match_tasks([task])
        if not matched:
            near = difflib.get_close_matches(task, manager.all_tasks, 4)
            own = "; for tasks of your own pass --include-path with their folder"
            raise UserError(f"unknown task {task!r}: {'did you mean ' + ', '.join(near) + '?' if near else ''}{own}")
        names += matched
    return list(dict.fromkeys(names))


def _load_tasks(tasks: Sequence[str], include_paths: Sequence[Path]) -> _LoadedTasks:
    """Load the tasks and groups, each once, with their data, fetched where it is not local."""
    manager = _task_manager(include_paths)
    names = _match_tasks(tasks, manager)
    loaded: dict[str, Any] = {}
    inside: set[str] = set()
    for name in names:
        try:
            built = manager.load([name])
        except Exception as error:  # a missing data set, a broken task file, a package that it needs
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"task {name} cannot be loaded: {reason}") from error
        # A group brings its tasks along; the tasks of a tag are listed by themselves.
        inside.update(child for children in built.get("group_map", {}).values() for child in children)
        loaded |= {**built.get("groups", {}), **built["tasks"]}
    return _LoadedTasks(manager, [item for name, item in loaded.items() if name not in inside])


def _load_lm(
    found: model_kinds.ModelFolder, tokenizer: Path | None, dtype: torch.dtype, device: torch.device, batch_size: int
) -> "LM":
    """Load a model, and the tokenizer in a folder or else its own, as lm-eval's language model."""
    loaded = _load_tokenizer(found, tokenizer)
    if found.kind == model_kinds.HUGGING_FACE:
        from lm_eval.models.huggingface import HFLM

        model = pretrained.load_model(found.path, dtype, device)
        pretrained.check_tokenizer(tokenizer or found.path, loaded, model.config.vocab_size)
        return HFLM(pretrained=model, tokenizer=loaded, batch_size=batch_size)
    stage = stages.load_stage(stages.open_shards(found), device, dtype)
    pretrained.check_tokenizer(tokenizer or found.path, loaded, stage.config.vocab_size)
    return scoring.as_lm(scoring.StageScorer(stage, device, batch_size=batch_size), loaded)


def _load_tokenizer(found: model_kinds.ModelFolder, folder: Path | None) -> "PreTrainedTokenizerBase":
    if folder is not None or found.kind != model_kinds.GPT_NEOX:
        return pretrained.load_tokenizer(folder or found.path)
    with tempfile.TemporaryDirectory() as written:
        stages.write_tokenizer(found, Path(written))
        return pretrained.load_tokenizer(Path(written))


def print_results(results: Mapping[str, Any]) -> None:
    """Print the table of `evaluate`'s results."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", box=box.SIMPLE)
    table.add_column("value", justify="right")
    table.add_column("stderr", justify="right")
    for one in list_values(results):
        table.add_row(one.task, one.metric, f"{one.value:.4f}", "" if one.stderr is None else f"{one.stderr:.4f}")
    Console().print(table)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print the table, and write the results where they are asked for."""
    parser = cli.Parser(
        prog="tools/run_evaluation.py",
        description="Evaluate a Hugging Face model, a training checkpoint, layer shards or GPT-NeoX's files with "
        "lm-eval; print a table.",
    )
    parser.add_argument("--model", required=True, help="a folder of any of the four kinds, or a hub name")
    parser.add_argument("--tasks", required=True, help="names, groups or patterns, by commas: lambada_openai,piqa")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (not given: the model's)")
    parser.add_argument("--num-fewshot", type=cli.natural, help="solved examples before each (not given: as the task)")
    parser.add_argument("--limit", type=cli.positive_int, help="only so many documents of each task (not given: all)")
    parser.add_argument("--batch-size", type=cli.positive_int, default=8, help="rows at a time")
    parser.add_argument("--include-path", type=Path, action="append", default=[], help="folder of tasks of your own")
    parser.add_argument("--device", default="auto", help="cpu, cuda:1, ...; auto: the first GPU, else the CPU")
    parser.add_argument(
        "--dtype",
        choices=hardware.PRECISIONS,
        default="auto",
        help="auto: as the chat takes it, bfloat16 on GPUs that compute in it; float32 on CPUs for small models",
    )
    parser.add_argument("--output", type=Path, help="write all results to this JSON file")
    args = parser.parse_args(argv)
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise UserError("--tasks names none: expected for example --tasks lambada_openai,piqa")
    if args.output is not None and args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: expected the name of a file to write")
    results = evaluate(
        args.model,
        tasks,
        tokenizer=args.tokenizer,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        include_paths=args.include_path,
        device=args.device,
        dtype=args.dtype,
    )
    if args.output is not None:
        write_text(args.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print_results(results)
