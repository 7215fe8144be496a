"""The moderation gate: which text of a reply may be shown. Without a moderator, all of it as it comes."""

import re
from collections.abc import Callable

from openchatkit.inference.moderation.moderator import Moderator, Verdict

Emit = Callable[[str], None]

# A reply is judged when a sentence has ended, or else after about this many characters.
STRETCH = 200
FAILED = "This text could not be judged by the moderation model, so it is not shown or answered."
_SENTENCE_END = re.compile(r"[.!?\u0964][\"')\]\u201d\u2019]*(?=\s)|[\u3002\uff01\uff1f]|.(?=\n)")


class ModerationGate:
    """Lets the text of one reply through to `emit`; `text` is what it has let through.

    With a moderator, text waits until the whole reply up to its end has been judged. Once a verdict is not `allowed`,
    nothing more of the reply comes out: the verdict's message takes its place, after what was shown before. `verdict`
    is the one that counts: the one that is not allowed, else the first warning, else the last. `refused` says that it
    was the question that was not allowed.
    """

    def __init__(
        self,
        emit: Emit,
        moderator: Moderator | None = None,
        question: str = "",
        *,
        system: str = "",
        begun: str = "",
    ) -> None:
        self._emit = emit
        self._moderator = moderator
        self._question = question
        self._system = system
        self._begun = begun
        self._shown: list[str] = []
        self._waiting = ""
        self.verdict: Verdict | None = None
        self.refused = False

    @property
    def text(self) -> str:
        return "".join(self._shown)

    @property
    def blocked(self) -> bool:
        """Whether a text was not allowed, so that nothing may follow it."""
        return self.verdict is not None and not self.verdict.allowed

    def check_question(self) -> None:
        """Judge the question, if there is a moderator, and the system text, which can ask for as much.

        The beginning of a reply, where the client gives one, is judged as an answer.
        """
        if self._moderator is None:
            return
        if self._system.strip():
            verdict = judge(self._moderator, self._system)
            # A warning is for the author of the system text, not for every reply.
            if not verdict.allowed:
                self._apply_verdict(verdict)
        if not self.blocked:
            self._apply_verdict(judge(self._moderator, self._question))
        if self._begun.strip() and not self.blocked:
            self._apply_verdict(judge(self._moderator, self._question, self._begun))
        self.refused = self.blocked

    def add(self, text: str) -> None:
        """Take the next piece of the reply."""
        assert not self.blocked, "a reply continues that was not allowed"
        if self._moderator is None:
            self._show(text)
            return
        self._waiting += text
        ends = [found.end() for found in _SENTENCE_END.finditer(self._waiting)]
        self._judge(len(self._waiting) if len(self._waiting) >= STRETCH else max(ends, default=0))

    def finish(self) -> None:
        """Judge, and let through, the text that is still waiting: the reply is complete."""
        if not self.blocked:
            self._judge(len(self._waiting))

    def _judge(self, end: int) -> None:
        """Judge the reply up to the first `end` characters that are waiting, and let them through."""
        if end == 0:
            return
        assert self._moderator is not None
        stretch = self._waiting[:end]
        self._apply_verdict(judge(self._moderator, self._question, self._begun + self.text + stretch))
        if not self.blocked:
            self._waiting = self._waiting[end:]
            self._show(stretch)

    def _apply_verdict(self, verdict: Verdict) -> None:
        if self.verdict is None or self.verdict.action != "warn" or not verdict.allowed:
            self.verdict = verdict
        if not verdict.allowed:
            self._waiting = ""
            self._show(f"\n\n{verdict.message}" if self._shown else verdict.message)

    def _show(self, text: str) -> None:
        if text:
            self._shown.append(text)
            self._emit(text)


def judge(moderator: Moderator, question: str, answer: str | None = None) -> Verdict:
    """The moderator's verdict; one that is not allowed where the moderator fails, in any way."""
    try:
        verdict = moderator.check(question, answer)
    except Exception:  # a model, a library or a policy that fails must never let a text through
        return Verdict(False, "", FAILED)
    if not isinstance(verdict, Verdict) or (verdict.allowed is not True and verdict.allowed is not False):
        return Verdict(False, "", FAILED)
    return verdict
