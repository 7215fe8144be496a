"""`distributed/layout.py`: the layers of stages; `tests/training/test_layouts.py` runs real ranks in all layouts."""

import pytest

from openchatkit.distributed.layout import stage_layers
from openchatkit.errors import UserError


@pytest.mark.parametrize(
    ("num_layers", "stages", "per_stage", "expected"),
    [
        (44, 8, 6, [(0, 6), (6, 12), (12, 18), (18, 24), (24, 30), (30, 36), (36, 42), (42, 44)]),
        (32, 4, 8, [(0, 8), (8, 16), (16, 24), (24, 32)]),
        (6, 4, 0, [(0, 2), (2, 3), (3, 4), (4, 6)]),
        (3, 1, 4, [(0, 3)]),
    ],
)
def test_the_layers_of_stages(num_layers, stages, per_stage, expected):
    assert stage_layers(num_layers, stages=stages, layers_per_stage=per_stage) == expected


@pytest.mark.parametrize(
    ("num_layers", "stages", "per_stage", "message"),
    [
        (32, 4, 4, "--num-layers 4 x --pipeline-group-size 4 = 16 layers, the model has 32: give --num-layers 8"),
        (12, 4, 4, "leaves the last of 4 stages without a layer"),
        (2, 4, 0, "the model has only 2 layers"),
    ],
)
def test_layers_that_do_not_fit_the_stages(num_layers, stages, per_stage, message):
    with pytest.raises(UserError, match=message):
        stage_layers(num_layers, stages=stages, layers_per_stage=per_stage)
