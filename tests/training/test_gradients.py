"""`training/gradients.py`: sums over replicas, when they are sent, and norms by unit."""

import dataclasses
from datetime import timedelta

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from model_configs import NEOX

from openchatkit.distributed.layout import Layout, make_layout
from openchatkit.models.stage import Stage
from openchatkit.training.gradients import Gradients, norms_of_units
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.runs import UNIT, cut_into_runs, list_places
from openchatkit.training.weights import Weights

CONFIG = dataclasses.replace(NEOX, vocab_size=96, hidden_size=64, num_layers=3, intermediate_size=256)
PASSES = 2


def make_gradients(layout, *, tied, sharded):
    stage = Stage(dataclasses.replace(CONFIG, tie_embeddings=tied))
    stage.init_weights(0)
    stages = LocalStages({0: stage})
    parameters = {(shard, name): p for shard, part in stages.named_shards() for name, p in part.named_parameters()}
    runs = cut_into_runs(list_places(stages), layout.replicas if sharded else 1)
    owner = layout.replica if sharded else None
    gradients = Gradients(
        stages, layout, parameters, runs, owner=owner, keeps_own=False, through_cpu=False, bucket=20_000
    )
    return stage, gradients


def lose(stage, seed):
    """Backpropagates some loss of some tokens."""
    tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(seed))
    stage.logits(stage(tokens)).square().mean().backward()


def reduce_with_and_without_overlap(rank):
    layout = make_layout(rank=rank, replicas=2, device=torch.device("cpu"), timeout=timedelta(seconds=60))
    found = {}
    for tied, sharded in ((False, False), (True, False), (True, True)):
        for overlap in (False, True):
            stage, gradients = make_gradients(layout, tied=tied, sharded=sharded)
            if overlap:
                gradients.expect_passes(PASSES)
            started = []
            for kind in ("all_reduce", "reduce"):
                monitor(kind, started)
            for step in range(2):
                for number in range(PASSES):
                    lose(stage, 100 * step + 10 * number + rank)
                sent_before_the_end = len(started)
                gradients.reduce()
                norms = gradients.squared_norms()
                own = torch.cat([gradients.of(run) for run in gradients.own])
                if step == 0:
                    gradients.clear()
                    started.clear()
            unmonitor()
            found[f"{tied} {sharded} {overlap}"] = [own.clone(), norms, torch.tensor(sent_before_the_end)]
    return found


_ORIGINAL = {name: getattr(dist, name) for name in ("all_reduce", "reduce")}


def monitor(name, calls):
    def call(*args, **kwargs):
        calls.append(name)
        return _ORIGINAL[name](*args, **kwargs)

    setattr(dist, name, call)


def unmonitor():
    for name, function in _ORIGINAL.items():
        setattr(dist, name, function)


def expect(*, tied):
    """Gradients of one process that has the rows of both replicas, by parameter; step 1."""
    stage = Stage(dataclasses.replace(CONFIG, tie_embeddings=tied))
    stage.init_weights(0)
    for number in range(PASSES):
        for rank in range(2):
            lose(stage, 100 + 10 * number + rank)
    return stage


def test_gradients_sent_during_the_backward_pass_are_the_same(tmp_path):
    results = gloo_ranks.run(reduce_with_and_without_overlap, 2, tmp_path)
    for name in ("False False", "True False", "True True"):
        at_end = [result[f"{name} False"] for result in results]
        during = [result[f"{name} True"] for result in results]
        for one, other in zip(at_end, during, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert one[2] == 0
            assert other[2] >= 3  # of several buckets
    plain = expect(tied=False)
    total = sum(parameter.grad.double().square().sum() for parameter in plain.parameters())
    for result in results:
        assert result["False False True"][1].sum() == pytest.approx(float(total), rel=1e-5)
        assert torch.equal(result["True False True"][1], result["True True True"][1])
    # Shared: the runs of both owners are all that a plain replica has.
    sizes = [len(result["True True True"][0]) for result in results]
    assert sum(sizes) == len(results[0]["True False True"][0])


def test_gradients_are_views_of_one_buffer():
    stage, gradients = make_gradients(Layout(0, torch.device("cpu")), tied=False, sharded=False)
    lose(stage, 1)
    expected = {name: parameter.grad.clone() for name, parameter in stage.named_parameters()}
    assert all(parameter.grad.abs().sum() > 0 for parameter in stage.parameters())
    gradients.reduce()
    gradients.clear()
    assert all(parameter.grad.abs().sum() == 0 for parameter in stage.parameters())
    lose(stage, 1)
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.fixture
def alone():
    """The layout of the only rank of a process group, which sends messages to itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Layout(0, torch.device("cpu"), data=dist.group.WORLD)
    dist.destroy_process_group()


def test_layers_are_compiled_again_between_passes_though_gradients_have_another_dtype(alone):
    """As other documents make it necessary on GPUs; here other rows do."""
    found = []
    for layout in (Layout(0, torch.device("cpu")), alone):
        stage = Stage(CONFIG)
        stage.init_weights(0)
        if layout is alone:
            stage.compile_layers("aot_eager")
        weights = Weights(LocalStages({0: stage}), layout, dtype=torch.bfloat16, shard_gradients=True)
        with torch.autocast("cpu", torch.bfloat16):
            for rows in (2, 3):
                tokens = torch.arange(16 * rows).view(rows, 16)
                stage(tokens).float().square().mean().backward()
        weights.reduce_gradients()
        found.append([weights._gradients.of(run) for run in weights.masters])
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)
    assert sum(gradient.abs().sum() > 0 for gradient in found[0]) > 30


def test_norms_are_those_of_units_and_the_rest():
    generator = torch.Generator().manual_seed(0)
    sizes = (1, UNIT - 1, UNIT, 2 * UNIT, 2 * UNIT + 3)
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    for gradient, norms in zip(gradients, norms_of_units(gradients), strict=True):
        expected = [piece.double().norm() for piece in gradient.split(UNIT)]
        assert norms.double().tolist() == pytest.approx([float(each) for each in expected], rel=1e-6)
