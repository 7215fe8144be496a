"""The conversation so far.

Owns how turns follow each other; how they are written for a model is `rendering`'s.
A conversation is a value: asking and answering make a new one, so a turn that fails is undone by keeping the old.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from openchatkit.formats import chat
from openchatkit.formats.chat import Turn


@dataclass(frozen=True)
class Conversation:
    """Turns, the human's and the bot's in alternation, under an optional system text (the date preamble)."""

    system: str = ""
    turns: tuple[Turn, ...] = ()

    def asked(self, text: str, passages: Sequence[str] = ()) -> "Conversation":
        """This conversation with a question, open for the bot's reply."""
        return replace(self, turns=(*self.turns, Turn("human", text, tuple(passages))))

    def answered(self, text: str) -> "Conversation":
        """This conversation with the reply to its last question, whose passages have done their work and go."""
        question = self.turns[-1]
        assert question.role == "human", question
        return replace(self, turns=(*self.turns[:-1], Turn("human", question.text), Turn("bot", text)))

    def without_oldest_pair(self) -> "Conversation":
        """This conversation without its first question and the reply to it."""
        return replace(self, turns=self.turns[2:])


def begin(*, date: bool = True) -> Conversation:
    """An empty conversation; `date` opens it with the present date and time, as the original kit did."""
    return Conversation(system=chat.preamble(datetime.now().astimezone()) if date else "")
