"""`training/optimizer.py`: learning rates; `test_layouts.py` and `test_devices.py` train with its optimizers."""

import pytest

from openchatkit.training.optimizer import learning_rate


def test_learning_rate_rises_to_the_peak_and_falls_to_nearly_nothing():
    rates = [learning_rate(step, peak=1.0, warmup_steps=4, total_steps=14) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == pytest.approx([1 - i / 10 for i in range(10)])
    assert learning_rate(20, peak=1.0, warmup_steps=4, total_steps=14) == 0
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=1) == 2.0
