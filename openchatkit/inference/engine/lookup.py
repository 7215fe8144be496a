"""Guessing the next tokens from what stands in the text already: prompt-lookup decoding (Saxena 2023).

A reply that quotes a passage says what the prompt says. The tokens that followed the last few tokens where they stood
before are tried in one forward pass; the model's own choice decides, so a wrong guess costs time and nothing else.
"""

from collections.abc import Sequence

# Runs of this many last tokens are looked for, the longest first: the longer, the surer.
LONGEST, SHORTEST = 4, 2
# The most tokens tried in one pass: on a CPU, about where a pass begins to cost more for its computing than for reading
# the weights.
MOST = 10
# A reply begins with this much credit; a wrong guess costs one, a right one earns one, up to twice as much.
CREDIT = 16


class Lookup:
    """The text so far, and drafts of what follows. Each token costs the same, however long the text is."""

    def __init__(self, prompt: Sequence[int], *, length: int | None = None) -> None:
        """`length` fixes that of all drafts; by default it follows how many were right."""
        self._tokens: list[int] = []
        # Behind which token a run of tokens ended last, but for the run that ends the text.
        self._ends: dict[tuple[int, ...], int] = {}
        self._fixed = length
        self._length = length or MOST // 2
        self._credit = CREDIT
        for token in prompt:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with this token."""
        end = len(self._tokens)
        for size in range(SHORTEST, LONGEST + 1):
            if size <= end:
                self._ends[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token)

    def draft(self, room: int) -> list[int]:
        """At most `room` tokens that may come next; none where the text says nothing, or guessing does not pay."""
        count = self._length if self._fixed else min(self._length, room)
        if self._credit <= 0 or not 0 < count <= room:
            return []
        end = len(self._tokens)
        for size in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._ends.get(tuple(self._tokens[end - size :]))
            if start is not None:
                # Where the two runs are nearer to each other than `count`, the draft goes on from itself.
                return [self._tokens[start + number % (end - start)] for number in range(count)]
        return []

    def judge(self, drafted: int, accepted: int) -> None:
        """Learn from a draft of which the first `accepted` were right."""
        self._credit = min(self._credit + accepted - (drafted - accepted), 2 * CREDIT)
        if not self._fixed:
            self._length = min(2 * self._length, MOST) if accepted == drafted else max(accepted, 2)
