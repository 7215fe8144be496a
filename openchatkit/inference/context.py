"""What of a conversation fits into the model's context.

The system text and the last turn always stay; the oldest question and its reply go first.
"""

from collections.abc import Callable
from dataclasses import dataclass

from openchatkit.errors import UserError
from openchatkit.inference.conversation import Conversation


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
    context_length: int | None,
    max_tokens: int,
) -> Fitted:
    """Drop oldest pairs until the prompt and `max_tokens` of reply fit into `context_length` tokens.

    A `context_length` of None means that the model sets no limit. Raises UserError when the last turn alone is too
    long.
    """
    dropped = 0
    while True:
        tokens = encode(conversation)
        if fits(len(tokens), context_length=context_length, max_tokens=max_tokens):
            return Fitted(conversation, tokens, dropped)
        if len(conversation.turns) < 3:
            raise too_long(len(tokens), context_length=context_length, max_tokens=max_tokens)
        conversation = conversation.without_oldest_pair()
        dropped += 1


def fits(prompt: int, *, context_length: int | None, max_tokens: int) -> bool:
    """Whether a prompt of so many tokens leaves room for the reply."""
    return context_length is None or prompt + max_tokens <= context_length


def too_long(prompt: int, *, context_length: int | None, max_tokens: int) -> UserError:
    """The error for a prompt that cannot be made shorter."""
    return UserError(
        f"this needs {prompt} tokens and its reply up to {max_tokens} (--max-tokens), more than the {context_length} "
        "that this model reads at once: say it shorter, or start with a smaller --max-tokens"
    )
