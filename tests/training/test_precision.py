"""`training/precision.py`: the dtype that all ranks agree on and its log line, and the loss scale."""

from dataclasses import dataclass

import pytest
import torch
from loguru import logger

from openchatkit.loading import hardware
from openchatkit.training.precision import LossScaler, compute_dtype

CPU = torch.device("cpu")


@dataclass
class TwoRanks:
    """A layout of two ranks, of which the other one gathers `other`."""

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
def test_auto_is_the_dtype_that_every_rank_computes_in(monkeypatch, log, own, other, taken):
    monkeypatch.setattr(hardware, "slowdown", lambda dtype: own)
    assert compute_dtype("auto", TwoRanks((other, None))) == taken
    assert log == [f"INFO computing in {str(taken).removeprefix('torch.')} (auto)\n"]


def test_a_given_precision_is_used_and_emulation_on_any_rank_is_logged(monkeypatch, log):
    monkeypatch.setattr(hardware, "slowdown", lambda dtype: 0.4)
    assert compute_dtype("bfloat16", TwoRanks((torch.bfloat16, "its processor emulates it"))) == torch.bfloat16
    assert log == ["INFO computing in bfloat16\n", "WARNING its processor emulates it\n"]


def test_only_rank_0_logs_the_precision(monkeypatch, log):
    monkeypatch.setattr(hardware, "slowdown", lambda dtype: 0.4)
    assert compute_dtype("auto", TwoRanks((torch.bfloat16, None), rank=1)) == torch.bfloat16
    assert log == []


def test_the_dynamic_loss_scale_is_megatrons():
    scaler = LossScaler.create(fp16=True, fixed=0, initial=16.0, minimum=2.0, window=3, hysteresis=2)
    history = []
    for overflow in [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]:
        scaler.update(overflow=bool(overflow))
        history.append(scaler.scale)
    # Megatron-LM's: after the first overflow each one halves the scale, until a window of good steps has passed.
    assert history == [16, 8, 4, 4, 4, 8, 8, 8, 16, 16, 8, 4, 2, 2, 2, 2, 2]
    for _ in range(4):
        scaler.update(overflow=True)
    assert scaler.scale == 2.0


def test_consecutive_overflows_are_counted_from_the_last_good_step():
    """DeepSpeed's `consecutive_hysteresis`: without it, the second since the last doubling halves the scale."""
    for consecutive, expected in ((False, [16, 16, 8, 8, 4, 2]), (True, [16, 16, 16, 16, 16, 8])):
        options = {"fp16": True, "fixed": 0, "initial": 16.0, "minimum": 1.0, "window": 100, "hysteresis": 2}
        scaler = LossScaler.create(**options, consecutive=consecutive)
        history = []
        for overflow in (1, 0, 1, 0, 1, 1):
            scaler.update(overflow=bool(overflow))
            history.append(scaler.scale)
        assert history == expected


def test_a_scale_is_exhausted_where_it_would_fall_below_the_least():
    """As DeepSpeed's scaler of ZeRO ends a run: not at the overflow that reaches the least scale, but at the next."""
    scaler = LossScaler.create(fp16=True, fixed=0, initial=4.0, minimum=2.0, window=1000, hysteresis=2)
    found = []
    for _ in range(4):
        found.append((scaler.scale, scaler.is_exhausted))
        scaler.update(overflow=True)
    assert found == [(4.0, False), (4.0, False), (2.0, True), (2.0, True)]
    assert not LossScaler.create(fp16=True, fixed=2.0, initial=4.0, minimum=2.0, window=1, hysteresis=1).is_exhausted


def test_the_loss_scale_resumes_from_its_state():
    scaler = LossScaler.create(fp16=True, fixed=0, initial=16.0, minimum=1.0, window=2, hysteresis=2)
    scaler.update(overflow=False)
    other = LossScaler.create(fp16=True, fixed=0, initial=1024.0, minimum=1.0, window=2, hysteresis=2)
    other.load_state_dict(scaler.state_dict())
    other.update(overflow=False)
    assert other.scale == 32.0
    fixed = LossScaler.create(fp16=True, fixed=128.0, initial=16.0, minimum=1.0, window=2, hysteresis=2)
    fixed.load_state_dict(scaler.state_dict())
    fixed.update(overflow=True)
    assert fixed.scale == 128.0
    assert LossScaler.create(fp16=False, fixed=0, initial=16.0, minimum=1.0, window=2, hysteresis=2).scale == 1.0
