"""The interface of a moderator: it judges a question, and a reply to it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """A judgement: `allowed` or not, the `label` that decided, and the message to show.

    `action` is "allow", "warn" or "block". The `message` replaces a text that is not allowed; with "warn" it is shown
    beside the text. `probability` is the label's; both are empty ("" and 0) when no judgement could be made, and
    `reason` then says why, for the log and not for the client.
    """

    allowed: bool
    label: str = ""
    message: str = ""
    action: str = ""
    probability: float = 0.0
    reason: str = ""


class Moderator(Protocol):
    """A judge of texts that fails closed: where it cannot judge, `check` returns a verdict that is not allowed."""

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """Judge a question (`answer` None), or the answer to it so far."""
