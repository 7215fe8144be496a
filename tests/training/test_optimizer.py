"""Learning rates, loss scales and partitions: pure functions, by the number."""

import pytest

from openchatkit.distributed.layout import stage_layers
from openchatkit.errors import UserError
from openchatkit.training.optimizer import learning_rate
from openchatkit.training.precision import LossScaler


def test_learning_rate_rises_to_the_peak_and_falls_to_nearly_nothing():
    rates = [learning_rate(step, peak=1.0, warmup_steps=4, total_steps=14) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == pytest.approx([1 - i / 10 for i in range(10)])
    assert learning_rate(20, peak=1.0, warmup_steps=4, total_steps=14) == 0
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=1) == 2.0


def test_dynamic_loss_scale():
    scaler = LossScaler.create(fp16=True, fixed=0, initial=16.0, minimum=2.0, window=3, hysteresis=2)
    history = []
    for overflow in [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]:
        scaler.update(overflow=bool(overflow))
        history.append(scaler.scale)
    # Megatron-LM's: once the first overflow was let pass, each halves, until a window of good steps has passed.
    assert history == [16, 8, 4, 4, 4, 8, 8, 8, 16, 16, 8, 4, 2, 2, 2, 2, 2]
    for _ in range(4):
        scaler.update(overflow=True)
    assert scaler.scale == 2.0


def test_loss_scale_goes_on_where_it_stood():
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


@pytest.mark.parametrize(
    ("num_layers", "stages", "per_stage", "expected"),
    [
        (44, 8, 6, [(0, 6), (6, 12), (12, 18), (18, 24), (24, 30), (30, 36), (36, 42), (42, 44)]),
        (32, 4, 8, [(0, 8), (8, 16), (16, 24), (24, 32)]),
        (6, 4, 0, [(0, 2), (2, 3), (3, 4), (4, 6)]),
        (3, 1, 4, [(0, 3)]),
    ],
)
def test_stage_layers(num_layers, stages, per_stage, expected):
    assert stage_layers(num_layers, stages=stages, layers_per_stage=per_stage) == expected


@pytest.mark.parametrize(
    ("num_layers", "stages", "per_stage", "message"),
    [
        (32, 4, 4, "--num-layers 4 x --pipeline-group-size 4 = 16 layers, the model has 32: give --num-layers 8"),
        (12, 4, 4, "leaves the last of 4 stages without a layer"),
        (2, 4, 0, "the model has only 2 layers"),
    ],
)
def test_layers_that_do_not_fit(num_layers, stages, per_stage, message):
    with pytest.raises(UserError, match=message):
        stage_layers(num_layers, stages=stages, layers_per_stage=per_stage)
