"""From a conversation to the tokens that the model reads: in the kit's own form, or by the model's chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.inference.conversation.conversation import Conversation


class Rendering(Protocol):
    """The written form of conversations for a model. No text in it can forge a turn.

    `stop_strings`, and the ids of special tokens in `stop_ids`, end a reply; `separator` is text that a model writes
    before a reply and that is not part of it.
    """

    name: str
    separator: str
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]

    def text(self, conversation: Conversation) -> str:
        """The prompt as one string, as the model reads it."""

    def tokens(self, conversation: Conversation) -> list[int]:
        """The prompt's token ids. UserError when this conversation cannot be written in this form."""

    def sizes(self, turns: Sequence[Turn]) -> list[int]:
        """Estimate the tokens that each of these turns takes when it is no longer the last."""


class KitRendering:
    """`formats.chat`: the form that this kit trains models on. Each segment is tokenised by itself, as in training.

    What the tokenizer puts before any text comes first, unless the model was trained by this kit, which puts nothing.
    """

    name = "kit"
    separator = " "
    stop_strings: tuple[str, ...] = chat.STOP_STRINGS
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prefix = () if chat.is_own_template(tokenizer.chat_template) else tokenizer.prefix

    def text(self, conversation: Conversation) -> str:
        return self._tokenizer.decode(self._prefix) + "".join(segment.text for segment in _segments(conversation))

    def tokens(self, conversation: Conversation) -> list[int]:
        return [*self._prefix, *encode(self._tokenizer, _segments(conversation))]

    def sizes(self, turns: Sequence[Turn]) -> list[int]:
        texts = [f"{chat.HUMAN if turn.role == 'human' else chat.BOT} {turn.text}\n" for turn in turns]
        return [len(ids) for ids in self._tokenizer.encode(texts)]


def choose(name: str, tokenizer: Tokenizer, folder: Path) -> Rendering:
    """Return the rendering that `name` means for the model in `folder`.

    "kit" is this kit's form, "model" the model's own chat template. "auto" is the model's, unless it has none or one
    that this kit wrote, which is equal to the kit's form. UserError where the template is missing or broken.
    """
    assert name in ("auto", "kit", "model"), name
    own = tokenizer.chat_template
    if name == "model" and not own:
        raise UserError(f"--template model: the model in {folder} has no chat template, use --template kit")
    if name == "kit" or not own or (name == "auto" and chat.is_own_template(own)):
        return KitRendering(tokenizer)
    from openchatkit.inference.conversation.templates import TemplateRendering

    return TemplateRendering(tokenizer)


def encode(tokenizer: Tokenizer, segments: Sequence[chat.Segment]) -> list[int]:
    """Token ids of segments, each tokenised by itself."""
    return [token for ids in tokenizer.encode([segment.text for segment in segments]) for token in ids]


def begun_text(text: str) -> str:
    """The beginning of a reply as in a turn, but with the white space at its end, since a model continues it."""
    return chat.content(text) + text[len(text.rstrip()) :] if text.strip() else ""


def _segments(conversation: Conversation) -> list[chat.Segment]:
    read = conversation.as_read()
    segments = chat.render(read.turns, system=chat.join_system([read.preamble, read.system]))
    begun = begun_text(read.begun)
    return [*segments, chat.Segment(f" {begun}", trained=True)] if begun else segments
