"""The choice of the next token from the model's logits: the settings, their valid values, and the draw.

The filters and their order are those of transformers' logits processors, so that a setting means the
same here: repetition penalty (Keskar et al. 2019, CTRL), temperature, top-k (Fan et al. 2018), top-p (Holtzman et al.
2019), min-p (Nguyen et al. 2024).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from openchatkit.errors import UserError
from openchatkit.texts import parse_bool

LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0  # of a repetition


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


def check(sampling: Sampling) -> None:
    """Raise UserError, with the setting, its value and the expected ones, unless every setting is valid."""
    for name, (kind, allowed, expected) in _RULES.items():
        value = getattr(sampling, name)
        # A bool is an int to Python, and numbers from JSON may be ints where a fraction is meant.
        right = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)
        if not (right and allowed(value)):
            raise _invalid(name, value, expected)


def change(sampling: Sampling, name: str, text: str) -> Sampling:
    """Return the settings with the field `name` read from what a user typed; UserError as `check`'s."""
    name = name.replace("-", "_")
    if name not in _RULES:
        raise UserError(f"there is no setting {name!r}: expected one of {', '.join(_RULES)}")
    kind, _, expected = _RULES[name]
    try:
        value = parse_bool(text) if kind is bool else kind(text)
    except ValueError:
        value = None
    if value is None:
        raise _invalid(name, text, expected)
    new = replace(sampling, **{name: value})
    check(new)
    return new


@torch.inference_mode()
def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    seen: torch.Tensor | None = None,
) -> int:
    """The next token id from float logits [vocabulary]: the largest, or a draw among those that the filters keep.

    `seen` [vocabulary] is true for the tokens that the model has read; only the repetition penalty asks for it.
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty without the tokens that it is for"
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.greedy or sampling.top_k == 1:
        best, token = logits.max(dim=-1)
        check_finite(best.item())
        return int(token)
    tokens, weights = _candidates(logits, sampling)
    drawn = int(torch.multinomial(weights, 1, generator=generator))
    return drawn if tokens is None else int(tokens[drawn])


def mark_seen(tokens: Iterable[int], logits: torch.Tensor) -> torch.Tensor:
    """The argument `seen` of `choose` for logits [..., vocabulary], on their device."""
    size = logits.shape[-1]
    # Some models have embeddings for more tokens than they have logits.
    ids = sorted(token for token in set(tokens) if token < size)
    return (
        torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(ids, dtype=torch.long), True).to(logits.device)
    )


def _candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The ids of the kept tokens (None: every id, in order) and their weights, float64 on the CPU."""
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    tokens = None
    if count < logits.shape[-1] or sampling.top_p < 1:
        largest_logits, tokens = torch.topk(logits, count)  # the largest first
        if (equal := int((logits >= largest_logits[-1]).sum())) > count:
            largest_logits, tokens = torch.topk(logits, equal)  # those that equal the last of them are kept as well
        logits = largest_logits
    values = logits.cpu().double()
    largest = values[0] if tokens is not None else values.max()
    check_finite(largest.item())
    # The largest is subtracted first, in float64: a tiny temperature must make no infinities and no zero to divide by.
    weights = torch.softmax((values - largest) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        weights = torch.where(before < sampling.top_p, weights, 0.0)
    if sampling.min_p > 0:
        weights = torch.where(weights >= sampling.min_p * weights.max(), weights, 0.0)
    return tokens, weights


def check_finite(largest: float) -> None:
    """UserError unless the largest of the model's logits is a number."""
    # Not-a-number counts as the largest of all in torch, so looking at the largest is enough.
    if not math.isfinite(largest):
        raise UserError(
            f"the model's output is {largest}, not a number: its values do not fit this precision, try --dtype "
            "bfloat16 or float32, or its weights are damaged"
        )


def _invalid(name: str, given: object, expected: str) -> UserError:
    shown = repr(given)
    return UserError(f"{name} {shown if len(shown) <= 40 else shown[:40] + '...'}: expected {expected}")


# Comparisons with not-a-number are false, so any bound refuses it.
_RULES: dict[str, tuple[type, Callable[..., bool], str]] = {
    "max_tokens": (int, lambda value: value >= 1, "a whole number of at least 1"),
    "sample": (bool, lambda value: True, "yes or no"),
    "temperature": (
        float,
        lambda value: 0 <= value <= 1e6,
        "a number from 0 to a million; 0 takes the most probable token",
    ),
    "top_k": (int, lambda value: value >= 0, "a whole number of at least 0; 0 keeps all tokens"),
    "top_p": (float, lambda value: 0 < value <= 1, "a number above 0 and at most 1; 1 keeps all tokens"),
    "min_p": (float, lambda value: 0 <= value <= 1, "a number from 0 to 1; 0 keeps all tokens"),
    "repetition_penalty": (
        float,
        lambda value: LEAST_PENALTY <= value <= MOST_PENALTY,
        f"a number from {LEAST_PENALTY:g} to {MOST_PENALTY:g}; 1 changes nothing",
    ),
}
