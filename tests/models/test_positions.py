"""`models/positions.py` against values of GPT-NeoX's own functions, and plain formulas."""

import json
import math
from pathlib import Path

import pytest
import torch

from openchatkit.models.positions import (
    RelativeBias,
    SinusoidalTable,
    alibi_bias,
    alibi_slopes,
    bucket_distances,
    list_buckets,
    measure_distances,
)

GOLDEN = json.loads((Path(__file__).parent / "neox_values.json").read_text(encoding="utf-8"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("heads", GOLDEN["alibi_slopes"])
def test_slopes_are_those_of_gpt_neox(heads):
    assert alibi_slopes(int(heads)).tolist() == pytest.approx(GOLDEN["alibi_slopes"][heads], rel=1e-7)


def test_sines_and_cosines_are_those_of_gpt_neox():
    wanted, positions = torch.tensor(GOLDEN["sinusoidal_8_by_6"]), torch.arange(8)
    table = SinusoidalTable(6)
    torch.testing.assert_close(table(positions[:3], 3), wanted[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(table(positions.view(2, 4), 8), wanted.view(2, 4, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (6, 9)])
def test_distances_have_the_buckets_of_the_formula(buckets, farthest):
    """d below half of the buckets: d; else half + floor(ln(d / half) / ln(farthest / half) half), at most the last."""
    half = buckets // 2
    growth = math.log(farthest / half)
    wanted = []
    for d in range(farthest + 1):
        logarithmic = 0 if d < half else half + math.floor(math.log(d / half) / growth * half + 1e-12)
        wanted.append(d if d < half else min(logarithmic, buckets - 1))
    assert list(bucket_distances(buckets, farthest)) == wanted


def test_biases_are_by_the_distance_to_tokens_before():
    distances = measure_distances(2, before=3, device=CPU)
    assert distances.tolist() == [[3, 2, 1, 0, 0], [4, 3, 2, 1, 0]]
    bias = alibi_bias(alibi_slopes(4), distances)
    assert bias.shape == (1, 4, 2, 5)
    assert bias[0, 1, 1].tolist() == [-4 / 16, -3 / 16, -2 / 16, -1 / 16, 0]


def test_a_relative_bias_is_its_buckets_row():
    bias = RelativeBias(8, 3, factor=2.0)
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    buckets = bucket_distances(8, 20)
    found = bias(list_buckets(40, 40, buckets=8, max_distance=20, device=CPU), 40)
    assert found.shape == (1, 3, 40, 40)
    for query, key in [(0, 0), (5, 0), (39, 39), (39, 0), (30, 12), (3, 9)]:
        bucket = buckets[min(max(query - key, 0), 20)]
        assert found[0, :, query, key].tolist() == (2 * bias.weight[bucket]).tolist()
    found.sum().backward()
    pairs = torch.tensor(buckets)[measure_distances(40, device=CPU).clamp(max=20)].flatten().bincount(minlength=8)
    assert torch.equal(bias.weight.grad, 2.0 * pairs.unsqueeze(1).expand(-1, 3))
    later = bias(list_buckets(3, 40, buckets=8, max_distance=20, device=CPU), 3)
    assert torch.equal(later, found[:, :, 37:])
