"""`distributed/layout.py`: the layers of stages; `tests/training/test_layouts.py` runs real ranks in all layouts."""

import itertools

import pytest
import torch

from openchatkit.distributed.layout import Layout, balanced_layers, stage_layers, stage_numbers
from openchatkit.errors import Interrupted, UserError


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
        (32, 4, 4, "--num-layers 4 x 4 stages = 16 layers, the model has 32: give --num-layers 8"),
        (12, 4, 4, "leaves the last of 4 stages without a layer"),
        (2, 4, 0, "the model has only 2 layers"),
    ],
)
def test_layers_that_do_not_fit_the_stages(num_layers, stages, per_stage, message):
    with pytest.raises(UserError, match=message):
        stage_layers(num_layers, stages=stages, layers_per_stage=per_stage)


@pytest.mark.parametrize(
    ("num_layers", "stages", "head", "counts"),
    [
        (24, 1, 3.0, [24]),
        (24, 4, 0.0, [6, 6, 6, 6]),
        (24, 4, 2.0, [7, 6, 6, 5]),
        (24, 4, 2.5, [7, 7, 6, 4]),
        (8, 4, 9.0, [2, 3, 2, 1]),
        (4, 4, 9.0, [1, 1, 1, 1]),
    ],
)
def test_stages_are_balanced_by_what_the_head_costs(num_layers, stages, head, counts):
    layers = balanced_layers(num_layers, stages=stages, head=head)
    assert [first for first, _ in layers[1:]] == [last for _, last in layers[:-1]]
    assert (layers[0][0], layers[-1][1]) == (0, num_layers)
    found = [last - first for first, last in layers]
    assert min(found) >= 1
    # No way to cut the layers makes the slowest stage faster.
    cuts = itertools.combinations(range(1, num_layers), stages - 1)
    best = min(
        max([b - a for a, b in itertools.pairwise([0, *cut])] + [num_layers - ([0, *cut][-1]) + head]) for cut in cuts
    )
    assert max([*found[:-1], found[-1] + head]) == best
    assert sorted(found) == sorted(counts)


def test_the_stages_of_a_rank():
    loop = {"pipeline_size": 4, "stages_a_rank": 3}
    assert [stage_numbers(rank, **loop) for rank in range(4)] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    v = {"pipeline_size": 4, "stages_a_rank": 2, "v_shaped": True}
    assert [stage_numbers(rank, **v) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_ranks_of_a_tensor_group_are_next_to_each_other():
    places = [Layout(rank, torch.device("cpu"), pipeline_size=3, replicas=2, tensor_size=2) for rank in range(12)]
    assert [place.tensor_rank for place in places] == [0, 1] * 6
    assert [place.pipeline_rank for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place.replica for place in places] == [0] * 6 + [1] * 6
    assert places[7].describe() == "rank 7 (pipeline rank 0 of 3, replica 1 of 2, tensor rank 1 of 2)"
    assert Layout(0, torch.device("cpu")).describe() == "rank 0"


def test_what_may_go_on_keeps_its_status_when_all_ranks_raise_it():
    def fail():
        raise Interrupted("the storage is busy")

    with pytest.raises(Interrupted, match="the storage is busy"):
        Layout(0, torch.device("cpu")).together(fail)
