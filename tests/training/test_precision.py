"""The precision that all ranks agree on, and what the log says of it."""

from dataclasses import dataclass

import pytest
import torch
from loguru import logger

from openchatkit.loading import hardware
from openchatkit.training.precision import compute_dtype

CPU = torch.device("cpu")


@dataclass
class TwoRanks:
    """A layout of two ranks, of which the other one found `other`."""

    other: tuple[torch.dtype, str | None]
    rank: int = 0
    device: torch.device = CPU

    def gather(self, value):
        return [value, self.other]


@pytest.fixture
def log():
    lines = []
    number = logger.add(lines.append, format="{level} {message}")
    yield lines
    logger.remove(number)


@pytest.mark.parametrize(
    ("own", "other", "taken"),
    [(0.4, torch.bfloat16, torch.bfloat16), (0.4, torch.float32, torch.float32), (9, torch.bfloat16, torch.float32)],
)
def test_auto_is_what_every_rank_computes_in(monkeypatch, log, own, other, taken):
    monkeypatch.setattr(hardware, "slowdown", lambda dtype: own)
    assert compute_dtype("auto", TwoRanks((other, None))) == taken
    assert log == [f"INFO computing in {str(taken).removeprefix('torch.')} (auto)\n"]


def test_what_is_asked_for_is_obeyed_and_its_cost_is_said_for_any_rank(monkeypatch, log):
    monkeypatch.setattr(hardware, "slowdown", lambda dtype: 0.4)
    assert compute_dtype("bfloat16", TwoRanks((torch.bfloat16, "its processor emulates it"))) == torch.bfloat16
    assert log == ["INFO computing in bfloat16\n", "WARNING its processor emulates it\n"]


def test_one_rank_alone_speaks(monkeypatch, log):
    monkeypatch.setattr(hardware, "slowdown", lambda dtype: 0.4)
    assert compute_dtype("auto", TwoRanks((torch.bfloat16, None), rank=1)) == torch.bfloat16
    assert log == []
