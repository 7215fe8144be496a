"""GPT-NeoX's evaluation command, over a task of local records: the same figures as the kit's own evaluation."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from neox_cases import write_task
from random_models import write_run

from openchatkit.neox import evaluation
from openchatkit.tools.evaluation import harness

lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager


@pytest.fixture
def command(
    write: Callable[..., Path],
    random_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in a folder with a run and a task; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # lm-eval takes seconds to read the thousands of task files that it brings along.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    write_run(tmp_path / "checkpoints", random_models["neox"], 3)
    write_task(tmp_path / "tasks")

    def command(*flags: object, **settings: Any) -> tuple[int, str, str]:
        given = {"load": "checkpoints", "eval_include_paths": ["tasks"], "train_micro_batch_size_per_gpu": 3}
        with pytest.raises(SystemExit) as ended:
            evaluation.main([str(write("c.json", given | settings)), *map(str, flags)])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return command


def test_results_are_printed_and_written_under_the_time(command, tmp_path):
    status, printed, noted = command("--eval_tasks", "own_choice", "--eval_results_prefix", "out/mine")
    assert status == 0, noted
    [path] = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"mine_eval_results_\d\d-\d\d-20\d\d-\d\d-\d\d-\d\d\.json", path.name)
    assert noted == f"the results are in out/{path.name}\n"
    written = json.loads(path.read_text())
    expected = harness.evaluate("checkpoints", ["own_choice"], include_paths=[Path("tasks")], device="cpu")
    assert written["results"] == expected["results"]
    assert written["config"]["eval_tasks"] == ["own_choice"]
    assert written["config"]["load"] == "checkpoints"
    value = expected["results"]["own_choice"]["acc,none"]
    assert re.search(rf"own_choice +acc +{value:.4f}", printed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_tasks", "own_chioce"], "unknown task 'own_chioce': did you mean own_choice?"),
        (["--eval_tasks", "own_choice", "--load", "none"], "--load none: it is no folder: train first"),
        (["--eval_tasks", "own_choice", "--iteration", "4"], "checkpoints has no checkpoint of it: there are 3"),
        (["--eval_tasks", "own_choice", "--eval_include_paths", "none"], "--include-path none is not a folder"),
        (["--eval_tasks", "own_choice", "--eval_results_prefix", "c.json/a"], "c.json is a file: expected a folder"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, flags, message):
    status, printed, noted = command(*flags)
    assert (status, printed, noted.count("\n")) == (2, "", 1)
    assert message in noted
    assert not list(tmp_path.glob("*.json.tmp")) + list(tmp_path.glob("*eval_results*"))


def test_a_configuration_without_tasks_means_those_of_gpt_neox(command, monkeypatch):
    asked = []
    monkeypatch.setattr(harness, "evaluate", lambda model, tasks, **_: asked.append(tasks) or {"results": {}})
    assert command()[0] == 0
    assert asked == [("lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa", "triviaqa")]
