"""A training step is short to follow: few calls of our own lead from the command to the loss function."""

import sys
import traceback
from pathlib import Path

import pytest
import ranks
import torch

from openchatkit.paths import ROOT

MOST_FRAMES = 9
LIBRARY = ROOT / "openchatkit"


def record_the_way_to_the_loss() -> None:
    """Let the first softmax, which in training the loss alone takes, write the calls of the library that led to it."""
    softmax = torch.softmax

    def recording_softmax(*args, **options):
        torch.softmax = softmax
        for frame in traceback.extract_stack():
            if Path(frame.filename).is_relative_to(LIBRARY):
                print("call:", Path(frame.filename).relative_to(LIBRARY), frame.name, file=sys.stderr)
        return softmax(*args, **options)

    torch.softmax = recording_softmax


@pytest.mark.parametrize("change", [{}, {"pipeline_group_size": 2, "pp_mode": "1f1b"}], ids=str)
def test_few_calls_lead_from_the_command_to_the_loss(tmp_path, flags, change):
    flags = {**flags, **change, "checkpoint_path": tmp_path / "ckpt"}
    world_size = flags.get("pipeline_group_size", 1)
    ended = ranks.train(tmp_path, flags, world_size=world_size, before_main=record_the_way_to_the_loss)
    assert ended.statuses == [0] * world_size, ended.errors
    calls = [line.removeprefix("call: ") for line in ended.errors[-1].splitlines() if line.startswith("call: ")]
    print("\n".join(calls))
    assert "training/command.py run" in calls
    assert calls[-1].startswith("training/loss.py")
    assert len(calls) <= MOST_FRAMES
