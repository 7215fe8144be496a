"""A rule that a moderation model can learn, texts that follow it, and an engine that needs no learning."""

import json
import math
import random
from collections.abc import Callable, Sequence

from openchatkit.formats.moderation import LABELS

# The rule: these words decide, the first of the list that a text holds; a text without them is casual.
RULE = (("bomb", "needs intervention"), ("steal", "needs caution"), ("sad", "possibly needs caution"))
FILLER = ("the", "cat", "likes", "to", "sit", "on", "a", "mat", "and", "we", "read", "books")


def sentence(draw: random.Random, word: str | None = None, *, words: int = 5) -> str:
    """Some filler words, with `word` somewhere among them."""
    chosen = draw.choices(FILLER, k=words)
    if word is not None:
        chosen.insert(draw.randrange(words + 1), word)
    return " ".join(chosen)


def labelled_rows(count: int, *, seed: int = 0) -> list[bytes]:
    """Records as prosocial-dialog has them: a quarter each of casual and of the three words."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        word, label = (*RULE, (None, "casual"))[number % 4]
        text = sentence(draw, word, words=draw.randint(1, 9))
        rows.append(json.dumps({"context": text, "safety_label": f"__{label.replace(' ', '_')}__"}).encode())
    return rows


class FakeEngine:
    """Gives every prompt the probabilities that `judge` has for its tokens; what is left of 1 is another continuation.

    `prompts` are those that it was asked about.
    """

    def __init__(self, judge: Callable[[Sequence[int]], Sequence[float]], *, context_length: int | None = 2048) -> None:
        self.context_length = context_length
        self.prompts: list[list[int]] = []
        self._judge = judge

    def log_likelihoods(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        self.prompts.append(list(prompt))
        assert len(continuations) == len(LABELS)
        return [math.log(p) if p else -1e9 for p in self._judge(prompt)]
