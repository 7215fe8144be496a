"""New weights: drawn by the shard, from the distributions that config.json gives."""

import math

import pytest
import torch

from openchatkit.models.registry import config_from_hf
from openchatkit.models.stage import Stage

RAW = {
    "model_type": "gpt_neox",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.5,
}
OUTPUTS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


def draw(**settings: float | str) -> dict[str, torch.Tensor]:
    stage = Stage(config_from_hf(RAW | settings))
    stage.init_weights(seed=3)
    return dict(stage.named_parameters())


def test_matrices_that_write_into_the_hidden_state_have_a_spread_of_their_own():
    drawn = draw(output_initializer_range=0.01)
    for name, weight in drawn.items():
        if weight.dim() > 1:
            expected = 0.01 if name.endswith(OUTPUTS) else 0.5
            torch.testing.assert_close(weight.std().item(), expected, rtol=0.05, atol=0)


def test_without_it_all_have_the_one_spread():
    for weight in draw().values():
        if weight.dim() > 1:
            torch.testing.assert_close(weight.std().item(), 0.5, rtol=0.05, atol=0)


def matrices(**settings: float | str) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in draw(**settings).items() if weight.dim() > 1}


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_xavier_spreads_by_rows_and_columns(gain):
    for method in ("xavier_uniform", "xavier_normal"):
        for name, weight in matrices(initializer=method, initializer_range=gain).items():
            std = gain * math.sqrt(2 / sum(weight.shape))
            torch.testing.assert_close(weight.std().item(), std, rtol=0.05, atol=0)
            if method == "xavier_uniform":
                # The bound is root 3 standard deviations, and some of so many are close to it.
                assert 0.99 < weight.abs().max() / (math.sqrt(3) * std) <= 1 + 1e-6, name
            else:
                assert weight.abs().max() > 2.5 * std, name


def test_orthogonal_matrices_keep_lengths_but_for_the_gain():
    for name, weight in matrices(initializer="orthogonal", initializer_range=math.sqrt(2)).items():
        narrow = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
        torch.testing.assert_close(narrow @ narrow.T, 2 * torch.eye(len(narrow)).double(), rtol=0, atol=1e-5)
        assert abs(weight.mean()) < 0.01, name


def test_orthogonal_matrices_are_as_likely_as_their_negatives():
    """Without the signs of R, the diagonal of what a QR decomposition gives is of one sign."""
    signs = [draw(initializer="orthogonal")["shards.layer_00000.attention.dense.weight"].diagonal().sign().sum()]
    assert abs(signs[0]) < 40  # of 128: four standard deviations


def test_matrices_that_write_into_the_hidden_state_have_a_distribution_of_their_own():
    drawn = matrices(initializer="xavier_normal", initializer_range=1.0, output_initializer="orthogonal")
    for name, weight in drawn.items():
        if name.endswith(OUTPUTS):
            product = weight.double() @ weight.double().T
            torch.testing.assert_close(product, torch.eye(128).double(), rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(weight.std().item(), math.sqrt(2 / sum(weight.shape)), rtol=0.05, atol=0)
