"""Speculative decoding without a second model: guesses from the text itself, prompt-lookup decoding (Saxena 2023).

A reply that quotes a passage repeats the prompt. The tokens that followed the last few tokens at an earlier place are
tried in one forward pass; the model's own choice decides, so a wrong guess costs time and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Runs of this many last tokens are looked for, the longest first: the longer, the surer.
MAX_RUN, MIN_RUN = 4, 2
# The most tokens tried in one pass: on a CPU, about where a pass begins to cost more for its computing than for reading
# the weights.
MAX_DRAFT = 10
# A reply begins with this much credit; a wrong guess costs one, a right one earns one, up to twice as much.
CREDIT = 16


@dataclass
class Speculation:
    """Tokens guessed to come next, read in one pass, of which the first `accepted` turned out right."""

    draft: Sequence[int] = ()
    accepted: int = 0

    def accept(self, token: int) -> bool:
        """Whether the next guess is `token`; if so, the logits after it are computed already, in row `accepted`."""
        right = self.accepted < len(self.draft) and self.draft[self.accepted] == token
        self.accepted += right
        return right


class PromptLookup:
    """The text so far, and guesses of what follows. Each token costs the same, however long the text is."""

    def __init__(self, prompt: Sequence[int], *, length: int | None = None) -> None:
        """`length` fixes that of all drafts; by default it follows how many guesses were right."""
        self._tokens: list[int] = []
        # The position after the last place of each run of tokens, except the run that ends the text.
        self._run_ends: dict[tuple[int, ...], int] = {}
        self._fixed = length
        self._length = length or MAX_DRAFT // 2
        self._credit = CREDIT
        for token in prompt:
            self.append(token)

    def append(self, token: int) -> None:
        """Continue the text with this token."""
        end = len(self._tokens)
        for size in range(MIN_RUN, MAX_RUN + 1):
            if size <= end:
                self._run_ends[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def guess(self, room: int) -> Speculation:
        """At most `room` tokens that may come next; none where the text says nothing, or guessing does not pay."""
        count = self._length if self._fixed else min(self._length, room)
        if self._credit <= 0 or not 0 < count <= room:
            return Speculation()
        end = len(self._tokens)
        for size in range(min(MAX_RUN, end), MIN_RUN - 1, -1):
            start = self._run_ends.get(tuple(self._tokens[end - size :]))
            if start is not None:
                # Where the two runs are nearer to each other than `count`, the draft continues from itself.
                return Speculation([self._tokens[start + number % (end - start)] for number in range(count)])
        return Speculation()

    def learn(self, outcome: Speculation) -> None:
        """Adapt credit and length to a speculation that has ended."""
        drafted, accepted = len(outcome.draft), outcome.accepted
        if not drafted:
            return
        self._credit = min(self._credit + accepted - (drafted - accepted), 2 * CREDIT)
        if not self._fixed:
            self._length = min(2 * self._length, MAX_DRAFT) if accepted == drafted else max(accepted, 2)
