"""`training/optimizer.py`: bfloat16 moments; `test_layouts.py` trains with all its optimizers."""

import pytest
import torch

from openchatkit.training.optimizer import AdamWithBfloat16Moments, _hash

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


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
