"""`models/dropout.py`: against plain integers, and its independence of how rows, places and heads are spread."""

import pytest
import torch

from openchatkit.models.dropout import (
    ATTENTION_OUTPUT,
    MLP_OUTPUT,
    attend_with_dropout,
    drop_hidden,
    drop_weights,
    mix,
    row_keys,
    uniform,
)


def plain_mix(key: int, number: int) -> int:
    mixed = ((key ^ number) + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def plain_elements(number: int) -> int:
    number = (number ^ number >> 16) * 0x7FEB352D % 2**32
    number = (number ^ number >> 15) * 0x846CA68B % 2**32
    return number ^ number >> 16


def test_numbers_are_those_of_plain_integers():
    keys = row_keys(-3, 2**40, 3)
    wanted = [plain_mix(plain_mix(0, -3 % 2**64), 2**40 + row) for row in range(3)]
    assert [key % 2**64 for key in keys.tolist()] == wanted
    numbers = uniform(mix(keys, 7), 5)
    for row, key in enumerate(plain_mix(key, 7) for key in wanted):
        low, high = (key % 2**32) ^ 2**31, key >> 32
        expected = [plain_elements(plain_elements(element) ^ low) ^ high for element in range(5)]
        assert [number % 2**32 for number in numbers[row].tolist()] == expected


def test_the_numbers_of_a_generator_that_is_known():
    """The first of SplitMix64 from seed 0, which https://prng.di.unimi.it/splitmix64.c computes."""
    assert mix(torch.tensor(0), 0).item() % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_the_rate_says_and_the_mean_stays(rate):
    hidden = torch.ones(8, 50, 256, dtype=torch.float64)
    found = drop_hidden(hidden, row_keys(0, 0, 8), MLP_OUTPUT, rate)
    assert sorted(found.unique().tolist()) == pytest.approx([0, 1 / (1 - rate)])
    deviation = (rate / (1 - rate) / hidden.numel()) ** 0.5
    assert found.mean().item() == pytest.approx(1, abs=4 * deviation)
    assert found.var().item() == pytest.approx(rate / (1 - rate), rel=0.05)
    # Neither rows, nor places, nor elements have more than others, and neighbours know nothing of each other.
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = found.mean(axes)
        spread = (rate / (1 - rate) / (hidden.numel() / len(means))) ** 0.5
        assert (means - 1).abs().max() < 5 * spread
    for axis in range(3):
        dropped = (found == 0).double() - rate
        pairs = (dropped * dropped.roll(1, axis)).mean() / (rate * (1 - rate))
        assert abs(pairs) < 5 / hidden.numel() ** 0.5


def test_a_sample_is_dropped_of_alike_in_any_batch_and_otherwise_in_another_place():
    hidden = torch.ones(4, 6, 64)
    whole = drop_hidden(hidden, row_keys(1, 100, 4), MLP_OUTPUT, 0.5)
    parts = [drop_hidden(hidden[:1], row_keys(1, 100 + row, 1), MLP_OUTPUT, 0.5) for row in range(4)]
    assert torch.equal(torch.cat(parts), whole)
    others = [
        drop_hidden(hidden, row_keys(1, 101, 4), MLP_OUTPUT, 0.5),
        drop_hidden(hidden, row_keys(2, 100, 4), MLP_OUTPUT, 0.5),
        drop_hidden(hidden, row_keys(1, 100, 4), ATTENTION_OUTPUT, 0.5),
        drop_hidden(hidden, mix(row_keys(1, 100, 4), 1), MLP_OUTPUT, 0.5),
    ]
    for other in others:
        assert 0.4 < (other == whole).double().mean() < 0.6


def test_heads_are_dropped_of_by_their_number_in_the_whole_layer():
    weights = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    keys = row_keys(0, 0, 2)
    whole = drop_weights(weights, keys, 0.5)
    parts = [drop_weights(weights[:, first : first + 2], keys, 0.5, first_head=first) for first in (0, 2)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(whole[whole != 0], (2 * weights)[whole != 0])


def test_gradients_are_dropped_where_values_are():
    hidden = torch.ones(2, 3, 16, requires_grad=True)
    found = drop_hidden(hidden, row_keys(0, 0, 2), MLP_OUTPUT, 0.25)
    found.sum().backward()
    assert torch.equal(hidden.grad, found.detach())


def test_nothing_is_dropped_without_keys_or_at_rate_0():
    hidden = torch.ones(2, 3, 16)
    assert drop_hidden(hidden, None, MLP_OUTPUT, 0.5) is hidden
    assert drop_hidden(hidden, row_keys(0, 0, 2), MLP_OUTPUT, 0.0) is hidden
    assert drop_weights(hidden, None, 0.5) is hidden


def test_scores_that_float16_holds_may_come_of_products_that_it_does_not():
    """As in torch's own kernels: 64 products of 50 and 50 are 160,000, and an eighth of that as a score."""
    states = torch.full((1, 1, 4, 64), 50.0, dtype=torch.float16)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    found = attend_with_dropout(states, states, states, mask, row_keys(0, 0, 1), rate=0.1)
    weights = drop_weights(torch.full((1, 1, 4, 4), 0.25), row_keys(0, 0, 1), 0.1)
    torch.testing.assert_close(found.float(), 50 * weights.sum(-1).view(1, 4, 1).expand(1, 4, 64), rtol=1e-3, atol=0)
