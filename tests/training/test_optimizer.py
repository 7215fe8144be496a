"""`training/optimizer.py` and its update rules; `test_layouts.py` trains with all of them."""

import json
from pathlib import Path

import pytest
import torch
from model_configs import NEOX

from openchatkit.distributed.layout import Layout
from openchatkit.formats import checkpoint
from openchatkit.models.stage import Stage
from openchatkit.training import config
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.optimization import OPTIMIZERS, fill_constants, name_moments
from openchatkit.training.optimizer import build_optimizer, convert_moments
from openchatkit.training.update_rules import SM3, AdamWithBfloat16Moments, Lion, Madgrad, _hash
from openchatkit.training.weights import Weights

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
GOLDEN = json.loads((Path(__file__).parent / "optimizer_traces.json").read_text(encoding="utf-8"))
OTHERS = [
    {"optimizer": "lion"},
    {"optimizer": "madgrad"},
    {"optimizer": "madgrad", "momentum": 0.0},
    {"optimizer": "sm3"},
    {"optimizer": "sm3", "momentum": 0.9, "sm3_beta": 0.95},
]


def update(tensor, gradients, *, start=0, decoupled=True, weight_decay=0.1):
    """Updates a tensor once with each gradient; returns the moments."""
    groups = [{"params": [tensor], "weight_decay": weight_decay}]
    optimizer = AdamWithBfloat16Moments(groups, {tensor: start}, decoupled=decoupled, **OPTIONS)
    for gradient in gradients:
        tensor.grad = gradient.clone()
        optimizer.step()
    return optimizer.state[tensor]


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_with_bfloat16_moments_is_adams(decoupled):
    """The first, whose moments are not rounded yet, and later ones up to bfloat16's rounding of moments."""
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(300, generator=generator), torch.randn(5, 300, generator=generator)
    for steps, tolerance in ((1, 1e-5), (5, 0.02)):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        expected, tensor = weights.clone(), weights.clone()
        reference = kind([expected], weight_decay=0.1, **OPTIONS)
        for gradient in gradients[:steps]:
            expected.grad = gradient.clone()
            reference.step()
        state = update(tensor, gradients[:steps], decoupled=decoupled)
        assert (tensor - expected).abs().max() < tolerance * OPTIONS["lr"] * steps
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert float(state["step"]) == steps


def test_second_moments_in_bfloat16_follow_small_changes():
    """A thousand steps of a gradient of 1: to the nearest bfloat16 the moment would stop at a fraction of 0.63."""
    state = update(torch.zeros(20_000), torch.ones(1000, 20_000))
    expected = 1 - 0.999**1000
    assert abs(float(state["exp_avg_sq"].double().mean()) - expected) < 0.002


def test_rounding_depends_on_the_place_in_the_whole_parameter():
    generator = torch.Generator().manual_seed(1)
    weights, gradients = torch.randn(200_000, generator=generator), torch.randn(3, 200_000, generator=generator)
    whole = weights.clone()
    state = update(whole, gradients)
    for start, stop in ((0, 4096), (4096, 200_000)):
        piece = weights[start:stop].clone()
        found = update(piece, gradients[:, start:stop], start=start)
        assert torch.equal(piece, whole[start:stop])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[key], state[key][start:stop])


def test_random_bits_are_murmurs():
    """Against Python's integers of any size, at numbers beyond 32 bits, too."""

    def murmur(number):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            number = (number ^ number >> shift) * factor % (1 << 32)
        return number ^ number >> 16

    for start, step in ((0, 1), (1 << 31, 7), ((1 << 33) + 5, 123_456)):
        bits = _hash(50, start, step, torch.device("cpu"))
        assert bits.dtype == torch.int32
        expected = [murmur((start + place + step * 0x9E3779B9) % (1 << 32)) for place in range(50)]
        assert [int(each) % (1 << 32) for each in bits] == expected


@pytest.mark.parametrize("trace", GOLDEN["traces"], ids=lambda trace: f"{trace['name']}-{trace['options']}")
def test_update_rules_are_gpt_neoxs(trace):
    """With the constants that are taken where none are given."""
    options = dict(trace["options"])
    values = {"optimizer": trace["name"]} | {key: options[key] for key in ("momentum",) if key in options}
    fill_constants(values)
    tensor = torch.tensor(GOLDEN["start"])
    groups = [{"params": [tensor], "weight_decay": options.get("weight_decay", 0.0)}]
    lr, momentum, eps = options["lr"], values["momentum"], values["adam_eps"]
    rule = {
        "lion": lambda: Lion(groups, lr=lr, betas=(0.9, values["adam_beta2"])),
        "madgrad": lambda: Madgrad(groups, lr=lr, momentum=momentum, eps=eps),
        "sm3": lambda: SM3(groups, lr=lr, momentum=momentum, beta=options.get("beta", 0.0), eps=eps),
    }[trace["name"]]()
    for gradient, after in zip(GOLDEN["gradients"], trace["after"], strict=True):
        tensor.grad = torch.tensor(gradient)
        rule.step()
        assert torch.allclose(tensor, torch.tensor(after), rtol=0, atol=2e-7)


@pytest.mark.parametrize("beta", [0.0, 0.95])
def test_sm3_bounds_the_sums_of_rows_and_columns(monkeypatch, beta):
    """Against loops over elements, in float64; chunks of two rows give the same."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    expected, rows, columns = weights.clone(), [0.0] * 5, [0.0] * 3
    tensor, vector = weights.clone(), weights[0].clone()
    monkeypatch.setattr("openchatkit.training.update_rules._CHUNK", 6)
    rule = SM3([{"params": [tensor, vector]}], lr=0.1, momentum=0.0, beta=beta, eps=1e-30)
    for gradient in gradients:
        sums = [
            [min(rows[i], columns[j]) * (beta or 1) + (1 - beta) * float(gradient[i, j]) ** 2 for j in range(3)]
            for i in range(5)
        ]
        kept = (rows, columns) if beta else ([0.0] * 5, [0.0] * 3)
        rows = [max([kept[0][i], *sums[i]]) for i in range(5)]
        columns = [max([kept[1][j], *(sums[i][j] for i in range(5))]) for j in range(3)]
        expected -= 0.1 * gradient / (torch.tensor(sums, dtype=torch.float64) + 1e-30).sqrt()
        tensor.grad, vector.grad = gradient.clone(), gradient[0].clone()
        rule.step()
        assert torch.allclose(tensor, expected, rtol=1e-12)
    assert [float(each) for each in rule.state[tensor]["accumulator_0"]] == pytest.approx(rows)
    assert [float(each) for each in rule.state[tensor]["accumulator_1"]] == pytest.approx(columns)
    # That of a vector is a sum for each element: Adagrad's, or a mean that never falls.
    sums = torch.zeros(3, dtype=torch.float64)
    for gradient in gradients[:, 0]:
        now = sums * (beta or 1) + (1 - beta) * gradient**2
        sums = torch.maximum(now, sums)
    assert torch.allclose(rule.state[vector]["accumulator_0"], sums)


def make_weights(*, replicas=1, rank=0):
    """The weights of a small model as one of some replicas that share their state has them."""
    layout = Layout(rank, torch.device("cpu"), replicas=replicas, data=object() if replicas > 1 else None)
    stage = Stage(NEOX)
    stage.init_weights(0)
    return Weights(LocalStages({0: stage}), layout, dtype=torch.float32, sharded=replicas > 1)


def build(weights, **change):
    argv = ["--model-name", "m", "--task-name", "d", "--total-steps", "1"]
    given = config.parse([*argv, *(f"--{name.replace('_', '-')}={value}" for name, value in change.items())])
    weights.optimizer = build_optimizer(
        given.optimizer,
        weights,
        lr=1e-3,
        betas=(given.adam_beta1, given.adam_beta2),
        eps=given.adam_eps,
        weight_decay=0.1,
        moments=given.moments,
        momentum=given.momentum,
        sm3_beta=given.sm3_beta,
    )
    return weights


def take_step(weights, number):
    """A step with gradients of the whole model that depend on the step alone, of which `weights` have their share."""
    for run, master in weights.masters.items():
        generator = torch.Generator().manual_seed(1000 * number + run.place.shard_number)
        gradient = torch.randn(run.place.elements, generator=generator)
        master.grad = gradient[run.start : run.stop].view(master.shape)
    weights.optimizer.step()


@pytest.mark.parametrize("change", [{}, {"optimizer_state": "bf16"}, *OTHERS], ids=str)
def test_stored_state_goes_on_in_any_layout(tmp_path, change):
    """Two steps, a checkpoint by the parameters' names, a third step: as three without it, alone and as a replica."""
    whole = build(make_weights(), **change)
    take_step(whole, 1)
    take_step(whole, 2)
    stored = {shard: whole.gather(shard) for shard in whole.stages.shards}
    for shard, entries in stored.items():
        checkpoint.write_weights(tmp_path, shard, {name: weight for name, (weight, _) in entries.items()})
        checkpoint.write_optimizer(tmp_path, shard, {name: state for name, (_, state) in entries.items()})
    take_step(whole, 3)
    expected = {run.place.key: master.detach() for run, master in whole.masters.items()}
    for replicas, rank in ((1, 0), (3, 0), (3, 1), (3, 2)):
        if replicas > 1 and change.get("optimizer") == "sm3":
            continue  # refused: it needs whole matrices
        resumed = make_weights(replicas=replicas, rank=rank)
        build(resumed, **change)
        for shard in resumed.stages.shards:
            read = checkpoint.read_optimizer(tmp_path, shard)
            weights = {name: weight for name, (weight, _) in stored[shard].items()}
            assert read.keys() == weights.keys()
            resumed.take_state(shard, {name: convert_moments(s, resumed.optimizer) for name, s in read.items()})
            file = checkpoint.TensorFile(tmp_path / f"{shard}.safetensors").read(weights)
            for run, master in resumed.masters.items():
                if run.place.shard == shard:
                    master.data.copy_(file[run.place.name].view(-1)[run.start : run.stop].view(master.shape))
        take_step(resumed, 3)
        for run, master in resumed.masters.items():
            whole_of_run = expected[run.place.key].view(-1)[run.start : run.stop]
            assert torch.equal(master.detach().view(-1), whole_of_run), run


def test_every_optimizer_has_its_bytes_in_the_plan():
    from openchatkit.training.plan.memory import MOMENTS

    forms = {name_moments(name, "float32", momentum) for name in OPTIMIZERS for momentum in (0.0, 0.9)}
    assert forms | {"bf16"} == set(MOMENTS)
