"""New weights: drawn by the shard, from the spreads that config.json gives."""

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


def draw(**settings: float) -> dict[str, torch.Tensor]:
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
