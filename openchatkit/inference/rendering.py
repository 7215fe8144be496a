"""From a conversation to the tokens that the model reads: in the kit's own form, or by the model's chat template."""

from collections.abc import Sequence
from typing import Protocol

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import chat
from openchatkit.inference.conversation import Conversation


class Rendering(Protocol):
    """How a conversation is written for a model. No text in it can forge a turn. `stop_strings` end a reply."""

    name: str
    stop_strings: tuple[str, ...]

    def text(self, conversation: Conversation) -> str:
        """The prompt as one string, as the model reads it."""

    def tokens(self, conversation: Conversation) -> list[int]:
        """The prompt's token ids."""


class KitRendering:
    """`formats.chat`: the form that this kit trains models on. Each segment is tokenised by itself, as in training."""

    name = "kit"
    stop_strings = chat.STOP_STRINGS

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, conversation: Conversation) -> str:
        return chat.render_text(conversation.turns, system=conversation.system)

    def tokens(self, conversation: Conversation) -> list[int]:
        return encode(self._tokenizer, chat.render(conversation.turns, system=conversation.system))


def encode(tokenizer: Tokenizer, segments: Sequence[chat.Segment]) -> list[int]:
    """Token ids of segments, each tokenised by itself."""
    return [token for ids in tokenizer.encode([segment.text for segment in segments]) for token in ids]
