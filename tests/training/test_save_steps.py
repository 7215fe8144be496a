"""Which steps are saved, and where a run ends by itself to go on later."""

import pytest
import ranks

from openchatkit.distributed.processes import RankNotes
from openchatkit.formats import checkpoint, metrics
from openchatkit.training import config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", []),
        ("--checkpoint-steps 7", [7, 14, 21, 28]),
        ("--num-checkpoints 4", [8, 16, 24]),
        ("--checkpoint-growth 2", [1, 2, 4, 8, 16]),
        ("--checkpoint-growth 1.5", sorted({int(1.5**power) for power in range(9)})),
        ("--extra-save-steps 10,3,10", [3, 10]),
        ("--checkpoint-steps 10 --extra-save-steps 3,90", [3, 10, 20, 30]),
    ],
)
def test_steps_that_are_saved(flags, expected):
    settings = config.parse(["--model-name", "m", "--task-name", "d", "--total-steps", "30", *flags.split()])
    steps = settings.list_save_steps(30)
    assert [step for step in range(1, 31) if steps.is_due(step)] == expected
    for first, last in ((1, 30), (4, 29), (10, 10), (31, 30)):
        assert steps.count(first, last) == len([step for step in expected if first <= step <= last])


def test_a_run_ends_with_75_at_each_interval_and_goes_on(tmp_path, flags):
    root, notes = tmp_path / "ckpt", RankNotes(tmp_path)
    change = {"checkpoint_path": root, "total_steps": 5, "exit_interval": 2, "extra_save_steps": "1,5"}
    for status, step in ((75, 2), (75, 4), (0, 5)):
        notes.forget_end()
        ended = ranks.train(tmp_path, {**flags, **change}, environment=notes.environment)
        assert bool(notes.stop) is (status == 75), "the launcher would start it again, or not after a death"
        assert ended.statuses == [status], ended.errors
        assert checkpoint.latest(root).name == f"checkpoint_{step}"
        assert (f"error: stopped after step {step} of 5" in ended.errors[0]) is (status == 75)
        assert "the same command goes on from there" in ended.errors[0] or status == 0
        if step == 2:
            assert checkpoint.list_steps(root) == [1, 2]
    assert [row["step"] for row in metrics.read(root)] == [1, 2, 3, 4, 5]
