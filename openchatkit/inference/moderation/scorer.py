"""How probable each label is for a text, by the log-likelihood that a moderation model gives it.

Owns what of a text is read: all of it. A long text is judged in windows that overlap, and so is each form in which it
can be read. What the labels lead to is `policy`'s.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import moderation

# Tokens. Moderation models learn from utterances: in a long window, one bad sentence would drown among good ones.
WINDOW, OVERLAP = 256, 64
# Judged windows that are remembered: an answer is judged again and again as it grows, and only its end is new.
_REMEMBERED = 256


class UnjudgedError(Exception):
    """The model has given no judgement on a text; the message says why."""


@dataclass(frozen=True)
class Scores:
    """A window's judgement: the probabilities of `LABELS` in their order, which add up to 1.

    `share` is the probability that the model says one of them at all.
    """

    probabilities: tuple[float, ...]
    share: float


class Engine(Protocol):
    """What of `inference.engine.Engine` judging needs."""

    context_length: int | None

    def log_likelihoods(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]: ...


class Scorer:
    """A moderation model. UserError when its context has no room for a window of a useful size."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, window: int = WINDOW, overlap: int = OVERLAP) -> None:
        assert 0 <= overlap < window, (window, overlap)
        self._engine = engine
        self._tokenizer = tokenizer
        self._head, self._tail, *self._labels = tokenizer.encode(
            [moderation.HEAD, moderation.TAIL, *map(moderation.continuation, moderation.LABELS)]
        )
        self._head = [*tokenizer.prefix, *self._head]
        if engine.context_length is not None:
            around = len(self._head) + len(self._tail) + max(map(len, self._labels))
            window = min(window, engine.context_length - around)
            if window <= overlap:
                raise UserError(
                    f"this model reads {engine.context_length} tokens at once, of which the moderation prompt takes "
                    f"{around}: expected more than {around + overlap}, take a moderation model with a longer context"
                )
        self._window, self._overlap = window, overlap
        self._known: OrderedDict[tuple[int, ...], Scores] = OrderedDict()

    def scores(self, text: str, *, expired: Callable[[], bool] = lambda: False) -> list[Scores]:
        """The judgements of all windows of all readings of `text`; none of a text that is nothing but white space.

        UnjudgedError when the model's output is not a number, or when `expired` before all windows are judged.
        """
        found = []
        for window in self.windows(text):
            if expired():
                raise UnjudgedError(f"the time was over after {len(found)} windows of the text")
            found.append(self._score(window))
        return found

    def windows(self, text: str) -> list[tuple[int, ...]]:
        """The token ids of the windows. Each begins at a fixed place, so those of a growing text stay as they are."""
        found: list[tuple[int, ...]] = []
        for form in moderation.readings(text):
            tokens = self._tokenizer.encode([moderation.body(form)])[0]
            step = self._window - self._overlap
            last = max(len(tokens) - self._overlap, 1)
            found += [tuple(tokens[start : start + self._window]) for start in range(0, last, step)]
        return found

    def _score(self, window: tuple[int, ...]) -> Scores:
        if window in self._known:
            self._known.move_to_end(window)
            return self._known[window]
        prompt = [*self._head, *window, *self._tail]
        logs = self._engine.log_likelihoods(prompt, self._labels)
        if len(logs) != len(self._labels) or not all(map(math.isfinite, logs)):
            raise UnjudgedError("the model's output is not a number")
        largest = max(logs)
        weights = [math.exp(log - largest) for log in logs]
        total = sum(weights)
        scores = Scores(tuple(weight / total for weight in weights), min(1.0, math.exp(largest) * total))
        self._known[window] = scores
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return scores
