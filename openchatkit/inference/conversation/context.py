"""What of a conversation fits into the model's context.

The system text and the last turn always stay; the oldest question and its reply go first. More goes than has to: the
cut moves in strides of a quarter of the room, so that most turns only add to what the model has read already and its
caches stay of use. The cut is a function of the conversation alone, the same for a shell and for a server that keeps
nothing between two requests.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openchatkit.errors import UserError
from openchatkit.inference.conversation.conversation import Conversation, Turn

STRIDES = 4  # a stride is this part of the room


class TooLong(UserError):
    """What the model would have to read at once is more than it can."""


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits, its prompt's token ids, and how many oldest pairs of turns had to go."""

    conversation: Conversation
    tokens: list[int]
    dropped: int


def fit(
    conversation: Conversation,
    *,
    encode: Callable[[Conversation], list[int]],
    sizes: Callable[[Sequence[Turn]], list[int]],
    context_length: int | None,
    max_tokens: int,
) -> Fitted:
    """Drop oldest pairs until the prompt and `max_tokens` of reply fit into `context_length` tokens.

    `sizes` says about how many tokens of the prompt each of some turns takes, without passages. A `context_length` of
    None means that the model sets no limit. Raises UserError when the last turn alone is too long.
    """
    limits = {"context_length": context_length, "max_tokens": max_tokens}
    tokens = encode(conversation)
    if fits(len(tokens), **limits):
        return Fitted(conversation, tokens, 0)
    pairs = conversation.exchanges()
    # What the whole takes is known, so the texts of the pairs are measured once and no cut is tried in vain.
    turns = iter(sizes([turn for pair in pairs[:-1] for turn in pair]))
    weights = [sum(itertools.islice(turns, len(pair))) for pair in pairs[:-1]]
    room = context_length - max_tokens
    stride = max(1, room // STRIDES)
    dropped = _cut(weights, math.ceil((len(tokens) - room) / stride) * stride)
    while dropped < len(pairs):
        rest = conversation.without_oldest(dropped)
        tokens = encode(rest) if dropped else tokens
        if fits(len(tokens), **limits):
            return Fitted(rest, tokens, dropped)
        dropped += 1  # sizes are not exact
    raise too_long(len(tokens), **limits)


def fits(prompt: int, *, context_length: int | None, max_tokens: int) -> bool:
    """Whether a prompt of so many tokens leaves room for the reply."""
    return context_length is None or prompt + max_tokens <= context_length


def too_long(prompt: int, *, context_length: int | None, max_tokens: int) -> TooLong:
    """The error for a prompt that cannot be made shorter; where a shorter reply helps, it says how short."""
    problem = (
        f"this needs {prompt} tokens and its reply up to {max_tokens}, more than the {context_length} that this model "
        "reads at once: say it shorter"
    )
    room = context_length - prompt
    if room < 1:
        return TooLong(problem)
    return TooLong(
        f"{problem}, or make do with --max-tokens {room}", typed=f"{problem}, or make do with /set max_tokens {room}"
    )


def _cut(weights: list[int], least: int) -> int:
    """How many pairs, oldest first, weigh at least so many tokens together; all of them if they do not."""
    together = 0
    for count, weight in enumerate(weights, 1):
        together += weight
        if together >= least:
            return count
    return len(weights)
