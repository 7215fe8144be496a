"""`training/balance.py`: what the head costs beside a layer."""

import dataclasses

import torch

from openchatkit.formats.layer_shards import LayerShards
from openchatkit.training import balance


def test_a_head_is_measured_in_layers(prepared):
    """By counts of operations, since no test may depend on speed: the clock counts matrix products."""
    config = LayerShards.open(prepared["neox"]).config
    large = dataclasses.replace(config, vocab_size=20 * config.vocab_size)
    options = {"rows": 2, "length": 16, "dtype": torch.float32, "recompute": False}
    found = [measure(each, **options) for each in (config, large)]
    assert all(cost > 0 for cost in found)
    # Three products of [tokens, hidden] x [hidden, vocabulary] against those of 12 hidden^2 weights, forward and back.
    tokens, hidden = 2 * 16, config.hidden_size
    layer = 3 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    assert abs(found[0] - 3 * tokens * hidden * config.vocab_size / layer) < 0.05 * found[0]
    assert abs(found[1] - 20 * found[0]) < 0.05 * found[1]


def measure(config, **options):
    """Return `measure_head` by a clock of which a tick is a multiplication."""
    from torch.utils.flop_counter import FlopCounterMode

    class Clock(FlopCounterMode):
        def now(self):
            return self.get_total_flops() / 2

    with Clock(display=False) as clock:
        original, balance.time.perf_counter = balance.time.perf_counter, clock.now
        try:
            return balance.measure_head(config, torch.device("cpu"), **options)
        finally:
            balance.time.perf_counter = original
