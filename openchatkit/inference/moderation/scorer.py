"""Probabilities of the labels for a text, from the log-likelihoods that a moderation model gives them.

Owns which part of a text is read: all of it. A long text is judged in overlapping windows, and in each form in which it
can be read. `policy` says what the labels lead to.
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
# Judged windows to remember: a growing answer is judged again and again, and only its end is new.
_CACHE_SIZE = 256


class UnjudgedError(Exception):
    """The model gave no judgement on a text; the message says why."""


@dataclass(frozen=True)
class WindowScores:
    """The judgement of a window: the probabilities of `LABELS` in their order, which add up to 1.

    `share` is the probability that the model continues with any of the labels.
    """

    probabilities: tuple[float, ...]
    share: float


class LikelihoodEngine(Protocol):
    """The part of `inference.engine.engine.Engine` that a scorer needs."""

    @property
    def context_length(self) -> int | None: ...

    def log_likelihoods(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]: ...


class LabelScorer:
    """A moderation model. UserError when its context has no room for a window of a useful size."""

    def __init__(
        self, engine: LikelihoodEngine, tokenizer: Tokenizer, *, window: int = WINDOW, overlap: int = OVERLAP
    ) -> None:
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
        self._cache: OrderedDict[tuple[int, ...], WindowScores] = OrderedDict()

    def score(self, text: str, *, expired: Callable[[], bool] = lambda: False) -> list[WindowScores]:
        """Judge all windows of all readings of `text`; a text of white space alone has none.

        UnjudgedError when the model's output is not a number, or when `expired` before all windows are judged.
        """
        found: list[WindowScores] = []
        for window in self.windows(text):
            if expired():
                raise UnjudgedError(f"the time was over after {len(found)} windows of the text")
            found.append(self._score_window(window))
        return found

    def windows(self, text: str) -> list[tuple[int, ...]]:
        """Return the token ids of the windows. Each has a fixed start, so those of a growing text do not change."""
        found: list[tuple[int, ...]] = []
        for form in moderation.judged_forms(text):
            tokens = self._tokenizer.encode([moderation.body(form)])[0]
            step = self._window - self._overlap
            last = max(len(tokens) - self._overlap, 1)
            found += [tuple(tokens[start : start + self._window]) for start in range(0, last, step)]
        return found

    def _score_window(self, window: tuple[int, ...]) -> WindowScores:
        if window in self._cache:
            self._cache.move_to_end(window)
            return self._cache[window]
        prompt = [*self._head, *window, *self._tail]
        logs = self._engine.log_likelihoods(prompt, self._labels)
        if len(logs) != len(self._labels) or not all(map(math.isfinite, logs)):
            raise UnjudgedError("the model's output is not a number")
        largest = max(logs)
        weights = [math.exp(log - largest) for log in logs]
        total = sum(weights)
        scores = WindowScores(tuple(weight / total for weight in weights), min(1.0, math.exp(largest) * total))
        self._cache[window] = scores
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return scores
