"""How the next token is chosen from the model's logits: the settings, and the draw."""

import math
from dataclasses import dataclass

import torch

from openchatkit.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """The settings of one reply.

    `temperature` 0 is greedy, as is `sample=False`. `top_k` keeps the most probable tokens (0: all), `top_p` the fewest
    that together reach this probability, `min_p` those at least this share of the most probable one's;
    `repetition_penalty` divides (or, if negative, multiplies) the logits of tokens that the model has seen.
    """

    max_tokens: int = 128
    sample: bool = True
    temperature: float = 0.6
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return not self.sample or self.temperature == 0


@torch.inference_mode()
def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """The next token id from float logits [vocabulary]: the largest, or a draw among the `top_k` largest."""
    count = 1 if sampling.greedy else min(sampling.top_k, logits.shape[-1])
    if count == 1:
        best, token = logits.max(dim=-1)
        _check_finite(best.item())
        return int(token)
    values, tokens = torch.topk(logits, count)
    values = values.cpu().double()
    _check_finite(values[0].item())
    # The largest is taken off first, in float64: a tiny temperature must make no infinities and no zero to divide by.
    weights = torch.softmax((values - values[0]) / sampling.temperature, dim=-1)
    return int(tokens[torch.multinomial(weights, 1, generator=generator).item()])


def _check_finite(largest: float) -> None:
    # Not-a-number counts as the largest of all in torch, so looking at the largest is enough.
    if not math.isfinite(largest):
        raise UserError(
            f"the model's output is {largest}, not a number: its values do not fit this precision, try --dtype "
            "bfloat16 or float32, or its weights are damaged"
        )
