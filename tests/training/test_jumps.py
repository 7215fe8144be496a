"""`training/jumps.py`: which losses are marked, with which samples, and that a resume marks the same."""

import json
import random

import pytest
from loguru import logger

from openchatkit.formats import metrics
from openchatkit.training.jumps import LEAST, JumpFinder
from openchatkit.training.metrics import Reporter
from openchatkit.training.sinks import MetricsFile

ROWS = 8


def make_losses(steps: int) -> list[float]:
    """A loss that falls from 10 to 3 with the noise that small batches have."""
    chance = random.Random(3)
    return [3 + 7 * 0.97**step + chance.gauss(0, 0.1) for step in range(steps)]


def report(losses: list[float | None], finder: JumpFinder, *, first: int = 0) -> list[int]:
    """Return the steps that are marked, of the losses of steps from `first` + 1 on."""
    marked = []
    for step, loss in enumerate(losses, first + 1):
        row = {"step": step, "loss": loss, "trained_tokens": 5}
        if "jump" in finder.mark(row, range((step - 1) * ROWS, step * ROWS)):
            marked.append(step)
    return marked


def test_ordinary_losses_are_no_jumps():
    assert report(make_losses(2000), JumpFinder()) == []
    assert report([1e-5 * (1 + step % 2 / 50) for step in range(100)], JumpFinder()) == [], "of a loss that is learnt"


@pytest.mark.parametrize("loss", [9.0, None])
def test_a_jump_is_marked_with_its_samples_and_does_not_hide_the_next(loss):
    losses = make_losses(500)
    losses[300], losses[302] = loss, loss
    assert report(losses, JumpFinder()) == [301, 303]
    finder = JumpFinder({"loss": each} for each in losses[:300])
    row = {"step": 301, "loss": loss, "trained_tokens": 5}
    jump = finder.mark(row, range(2400, 2408))["jump"]
    assert (jump["first_sample"], jump["last_sample"]) == (2400, 2407)
    assert jump["usual_loss"] == pytest.approx(3, abs=0.2)
    assert "jump" not in finder.mark({**row, "loss": None, "trained_tokens": 0}, range(8)), "nothing was trained on"


def test_losses_that_stay_high_are_usual_after_a_while():
    losses = make_losses(400) + [9.0] * 100
    assert report(losses, JumpFinder())[-1] < 440


def test_nothing_is_a_jump_before_losses_are_known():
    assert report([3.0] * (LEAST - 1) + [50.0], JumpFinder()) == []
    assert report([3.0] * LEAST + [50.0], JumpFinder()) == [LEAST + 1]


def test_a_resumed_run_marks_the_same_steps(tmp_path):
    """Through the file, which drops what comes after the checkpoint."""
    losses = make_losses(120)
    losses[110] = 9.0
    expected = report(losses, JumpFinder())
    for step, loss in enumerate(losses[:80], 1):
        metrics.append(tmp_path, {"step": step, "loss": loss})
    metrics.append(tmp_path, {"step": 70, "evaluation_loss": 8.0})
    metrics.cut(tmp_path, 70)
    assert expected == report(losses[70:], JumpFinder(metrics.read(tmp_path)), first=70) == [111]


def test_a_jump_is_in_the_file_and_a_warning_that_says_how_to_see_the_rows(tmp_path):
    said: list[str] = []
    logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    reporter = Reporter([MetricsFile(tmp_path, first_step=0)], JumpFinder({"loss": 3.0} for _ in range(30)))
    reporter.report_step({"step": 31, "loss": 7.5, "trained_tokens": 9}, applied=True, samples=range(240, 248))
    reporter.close()
    [row] = metrics.read(tmp_path)
    assert row["jump"] == {"usual_loss": 3.0, "first_sample": 240, "last_sample": 247}
    assert json.dumps(row)
    assert said == [
        "step 31, samples 240 to 247: the loss jumps to 7.500 from 3.000; tools/inspect_data.py --checkpoint-path with "
        "--step 31 shows them"
    ]
