"""The part of a conversation that fits into the model's context.

The system text and the last turn always stay; the oldest question and its reply go first, as soon as less than a
quarter of the context, or than `max_tokens`, is left for the reply. A longer reply ends where the context does, since
most replies are much shorter than they may be.

More is dropped than necessary: the cut moves in strides of a quarter of the room, so that most turns only add to the
text that the model has read already, and its caches stay useful. The cut is a function of the conversation alone,
the same for a shell and for a server that keeps nothing between two requests.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openchatkit.errors import UserError
from openchatkit.inference.conversation.conversation import Conversation, Turn

_STRIDES = 4  # a stride is this part of the room
_RESERVE = 4  # a reply is kept at most this part of the context free


class TooLong(UserError):
    """The prompt is longer than the model can read at once."""


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits, its prompt's token ids, and how many of the oldest pairs of turns were dropped.

    `roomy` says whether the reply has all the room that is reserved for one.
    """

    conversation: Conversation
    tokens: list[int]
    dropped: int
    roomy: bool = True


def fit(
    conversation: Conversation,
    *,
    encode: Callable[[Conversation], list[int]],
    sizes: Callable[[Sequence[Turn]], list[int]],
    context_length: int | None,
    max_tokens: int,
) -> Fitted:
    """Drop oldest pairs until the prompt leaves the reply its `reserve` of `context_length` tokens.

    `sizes` estimates the tokens of the prompt that each of some turns takes, without passages. A `context_length` of
    None means that the model sets no limit. A last turn that is long may leave less; UserError when it leaves nothing.
    """
    tokens = encode(conversation)
    if context_length is None:
        return Fitted(conversation, tokens, 0)
    room = context_length - reserve(max_tokens, context_length)
    if len(tokens) <= room:
        return Fitted(conversation, tokens, 0)
    pairs = conversation.exchanges()
    # The whole is measured, so the texts of the pairs are measured only once and no cut is tried in vain.
    turns = iter(sizes([turn for pair in pairs[:-1] for turn in pair]))
    weights = [sum(itertools.islice(turns, len(pair))) for pair in pairs[:-1]]
    stride = max(1, room // _STRIDES)
    rest, dropped = conversation, _cut(weights, math.ceil((len(tokens) - room) / stride) * stride)
    while dropped < len(pairs):
        rest = conversation.without_oldest(dropped)
        tokens = encode(rest) if dropped else tokens
        if len(tokens) <= room:
            return Fitted(rest, tokens, dropped)
        dropped += 1  # sizes are not exact
    check(len(tokens), context_length)
    return Fitted(rest, tokens, dropped - 1, roomy=False)


def reserve(max_tokens: int, context_length: int) -> int:
    """Return the number of tokens that are kept free for a reply of up to `max_tokens`."""
    return min(max_tokens, max(1, context_length // _RESERVE))


def check(prompt: int, context_length: int | None) -> None:
    """Raise TooLong unless a prompt of this many tokens, which cannot be shortened, leaves room for a reply."""
    if context_length is not None and prompt >= context_length:
        raise TooLong(
            f"this needs {prompt} tokens and leaves none of the {context_length} that this model reads at once for a "
            "reply: say it shorter"
        )


def _cut(weights: list[int], least: int) -> int:
    """How many of the oldest pairs hold at least `least` tokens together; all of them if they hold fewer."""
    together = 0
    for count, weight in enumerate(weights, 1):
        together += weight
        if together >= least:
            return count
    return len(weights)
