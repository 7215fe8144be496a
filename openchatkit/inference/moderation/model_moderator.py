"""A moderator that joins a moderation model and a policy. It fails closed."""

import math
import threading
import time
from collections.abc import Callable

from loguru import logger

from openchatkit.errors import UserError
from openchatkit.inference.moderation.moderator import Verdict
from openchatkit.inference.moderation.policy import ANSWER, QUESTION, Policy
from openchatkit.inference.moderation.scorer import LabelScorer, UnjudgedError
from openchatkit.texts import reason_of

# A text that any moderation model has a label for, tried before the first chat.
_TRIAL = "Hello, how are you?"


class ModelModerator:
    """Judges each text by itself, as the models are trained: a question alone, and an answer alone.

    Any failure while a text is judged, except Ctrl-C, gives a verdict that does not allow the text, and a line in the
    log. Several threads may use it; one text is judged at a time.
    """

    def __init__(
        self, scorer: LabelScorer, policy: Policy, *, name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policy = policy
        self._scorer = scorer
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()

    def check(self, question: str, answer: str | None = None) -> Verdict:
        """Judge a question (`answer` None), or the answer to it so far."""
        return self.judge(question, QUESTION) if answer is None else self.judge(answer, ANSWER)

    def judge(self, text: str, part: str) -> Verdict:
        """Judge a text as a "question" or an "answer". A text without anything to read is allowed."""
        try:
            windows = self._label_probabilities(text)
            if not windows:
                return Verdict(True, action="allow")
            decision = self.policy.decide(part, windows)
        except Exception as error:  # whatever it is, the text has not been judged
            reason = reason_of(error)
            logger.warning(f"moderation failed, so this {part} is not allowed: {reason}")
            return Verdict(False, message=self.policy.messages["unjudged"], action="block", reason=reason)
        messages = {"allow": "", "warn": self.policy.messages["warning"], "block": self.policy.messages[part]}
        message = messages[decision.action].replace("{label}", decision.label)
        return Verdict(decision.action != "block", decision.label, message, decision.action, decision.probability)

    def try_out(self) -> None:
        """Raise UserError unless the model answers the moderation prompt with labels; a chat model, say, does not."""
        try:
            self._label_probabilities(_TRIAL)
        except UnjudgedError as error:
            raise UserError(
                f"--moderation-model {self._name} does not judge: {error}; expected a model that was trained on the "
                "prompt in docs/moderation.md, such as togethercomputer/GPT-JT-Moderation-6B"
            ) from error

    def describe(self) -> str:
        """Return the model and the policy in one line."""
        return f"{self._name}; {self.policy.describe()}"

    def _label_probabilities(self, text: str) -> list[tuple[float, ...]]:
        """Return the probabilities of the labels in each window. UnjudgedError when the model gives no judgement."""
        end = self._clock() + self.policy.seconds

        def expired() -> bool:
            return self._clock() > end

        with self._lock:
            windows = self._scorer.score(text, expired=expired)
        if expired():
            raise UnjudgedError(f"it took longer than {self.policy.seconds:g} seconds")
        share = min((window.share for window in windows), default=1.0)
        if not share >= self.policy.label_share:
            raise UnjudgedError(
                f"its labels together have a probability of {share:.2g}, expected at least {self.policy.label_share:g}"
            )
        found = [window.probabilities for window in windows]
        if not all(math.isfinite(p) for window in found for p in window):
            raise UnjudgedError("a probability is not a number")
        return found
