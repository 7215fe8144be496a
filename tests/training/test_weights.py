"""`training/weights.py`: runs of parameters, who writes what, and 8-bit state that is cut and joined again."""

import dataclasses

import pytest
import torch
from model_configs import NEOX

from openchatkit.distributed.layout import Layout
from openchatkit.models.cuts import Part
from openchatkit.models.stage import Stage
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.runs import Place, Run
from openchatkit.training.weights import Weights, _join_runs

GPTJ = dataclasses.replace(
    NEOX, family="gptj", attention_bias=False, vocab_size=408, hidden_size=64, num_layers=2, intermediate_size=256
)


def weights(*, replicas, rank=0, tensor_size=1, **change):
    """Weights as one of several ranks has them, which exchanges nothing."""
    layout = Layout(rank, torch.device("cpu"), replicas=replicas, tensor_size=tensor_size, data=object())
    stage = Stage(dataclasses.replace(GPTJ, **change), part=Part(layout.tensor_rank, tensor_size))
    return Weights(LocalStages({0: stage}), layout, dtype=torch.float32, sharded=True)


def test_all_parts_find_the_same_writer():
    """Biases that only the first part has do not tip the scales: else parts wait for different replicas at a save."""
    parts = [weights(replicas=3, rank=rank, tensor_size=2) for rank in range(2)]
    for shard in parts[0].stages.shards:
        assert parts[0].writer(shard) == parts[1].writer(shard), shard


@pytest.mark.parametrize("elements", [2 * 65536, 65536])
def test_tables_of_eight_bit_state_are_not_cut(elements):
    """Tables of 256 values, beside scales of blocks that are as many by chance: of a run, or of the whole."""
    half = elements // 2
    place = Place("layer_00000", "mlp.fc_in.weight", elements, 1)
    table, scales = torch.arange(256.0), torch.rand(elements // 256)
    runs = [Run(place, 0, half, 0), Run(place, half, elements, 1)]
    pieces = [
        (
            run,
            torch.zeros(half),
            {
                "step": 1,
                "state1": torch.full((half,), number, dtype=torch.uint8),
                "qmap1": table,
                "absmax1": scales[run.start // 256 : run.stop // 256],
            },
        )
        for number, run in enumerate(runs)
    ]
    _, state = _join_runs(pieces, (256, elements // 256))
    assert torch.equal(state["qmap1"], table)
    assert torch.equal(state["absmax1"], scales)
    assert state["state1"].shape == (256, elements // 256)


def test_runs_take_whole_tables_of_eight_bit_state():
    found = weights(replicas=3, rank=1, hidden_size=256, num_heads=8, num_layers=1)
    found.optimizer = torch.optim.SGD(list(found.masters.values()))
    shapes = {run.place.name: found.parameter(run).shape for run in found.masters if run.place.shard == "layer_00000"}
    stored = {
        name: {
            "state1": torch.zeros(shape, dtype=torch.uint8),
            "qmap1": torch.arange(256.0),
            "absmax1": torch.arange(-(-shape.numel() // 256)),
        }
        for name, shape in shapes.items()
    }
    found.take_state("layer_00000", stored)
    cut = [(run, master) for run, master in found.masters.items() if run.place.shard == "layer_00000"]
    assert any(not run.is_whole and run.place.elements == 65536 for run, _ in cut)
    for run, master in cut:
        state = found.optimizer.state[master]
        assert torch.equal(state["qmap1"], torch.arange(256.0)), run
        assert state["state1"].shape == master.shape
        expected = torch.arange(-(-run.place.elements // 256))[run.start // 256 : -(-run.stop // 256)]
        assert torch.equal(state["absmax1"], expected), run


def test_a_replica_may_have_nothing_to_update():
    """More replicas than a small stage has units."""
    found = weights(replicas=500, rank=499, num_layers=1)
    assert not found.masters
    found.optimizer = torch.optim.AdamW([{"params": []}])
    found._exchange_weights = lambda: None  # exchanges with the others
    found.step(0.5, 1e-3)
