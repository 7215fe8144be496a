"""What a moderator is to the rest of the chat: something that judges a question, and a reply to it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """A judgement: `allowed` or not, the `label` that decided, and what is shown instead if it is not allowed."""

    allowed: bool
    label: str = ""
    message: str = ""


class Moderator(Protocol):
    """Judges texts. Fails closed: when no judgement can be made, `check` returns a verdict that is not allowed."""

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """Judge a question (`answer` None), or what has been said so far in answer to it."""
