"""What a moderator is to the rest of the chat: something that judges a question, and a reply to it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """A judgement: `allowed` or not, the `label` that decided, and what is shown.

    The `message` stands in the place of what is not allowed; with the `action` "warn" it is shown beside what is.
    `action` is "allow", "warn" or "block". `probability` is the label's; both are nothing ("" and 0) when no judgement
    could be made, and `reason` then says why, which is for the log and not for who asked.
    """

    allowed: bool
    label: str = ""
    message: str = ""
    action: str = ""
    probability: float = 0.0
    reason: str = ""


class Moderator(Protocol):
    """Judges texts. Fails closed: when no judgement can be made, `check` returns a verdict that is not allowed."""

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """Judge a question (`answer` None), or what has been said so far in answer to it."""
