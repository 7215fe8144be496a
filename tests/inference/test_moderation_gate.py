"""The moderation gate: no text before its verdict, and none after one that is not allowed."""

import pytest

from openchatkit.inference.moderation.moderator import Verdict
from openchatkit.inference.moderation_gate import FAILED, STRETCH, ModerationGate, judge


class Forbidding:
    """A moderator that forbids texts with a word in them, and remembers what it was asked."""

    def __init__(self, word: str = "bad", *, verdict: Verdict | None = None) -> None:
        self.asked = []
        self._word = word
        self._verdict = verdict or Verdict(False, "needs intervention", "Not this.", "block")

    def check(self, question, answer=None):
        self.asked.append((question, answer))
        return self._verdict if self._word in (question if answer is None else answer) else Verdict(True)


class Failing:
    def __init__(self, error):
        self._error = error

    def check(self, question, answer=None):
        raise self._error


def let_through(pieces, moderator, question="q"):
    """What comes out for each piece, and at the end; and the gate."""
    out = []
    gate = ModerationGate(out.append, moderator, question)
    steps = []
    for piece in pieces:
        gate.add(piece)
        steps.append("".join(out))
        if gate.blocked:
            break
    gate.finish()
    return [*steps, "".join(out)], gate


def test_without_a_moderator_every_piece_is_shown_as_it_comes():
    assert let_through(["a", "", "b"], None)[0] == ["a", "a", "ab", "ab"]


def test_a_stretch_is_shown_when_the_reply_up_to_its_end_is_judged():
    moderator = Forbidding()
    steps, gate = let_through(["One", " is", ". Two", "\nthree"], moderator)
    assert steps == ["", "", "One is.", "One is. Two", "One is. Two\nthree"]
    assert moderator.asked == [("q", text) for text in steps[2:]]
    assert gate.text == steps[-1]


def test_text_without_sentences_is_judged_after_a_while():
    steps, _ = let_through(["x" * (STRETCH - 1), "y"], Forbidding())
    assert steps[0] == ""
    assert len(steps[1]) == STRETCH


def test_what_is_not_allowed_is_never_shown_and_the_message_stands_in_its_place():
    steps, gate = let_through(["Good. ", "A b", "ad thing. ", "more"], Forbidding())
    assert steps == ["Good.", "Good.", "Good.\n\nNot this.", "Good.\n\nNot this."]
    assert gate.blocked
    assert gate.verdict.label == "needs intervention"


def test_what_is_not_allowed_at_the_end_is_not_shown_either():
    assert let_through(["Good. ", "Very b", "ad"], Forbidding())[0][-1] == "Good.\n\nNot this."
    assert let_through(["b", "ad"], Forbidding())[0][-1] == "Not this."


def test_a_word_that_is_cut_by_a_stretch_is_judged_whole():
    steps, gate = let_through(["x" * (STRETCH - 2), " b", "ad"], Forbidding())
    assert gate.blocked
    assert steps[-1].endswith(" b\n\nNot this.")


def test_a_question_is_judged_by_itself():
    out = []
    gate = ModerationGate(out.append, Forbidding(), "a bad one")
    gate.check_question()
    assert (gate.blocked, out) == (True, ["Not this."])
    gate = ModerationGate(out.append, None, "a bad one")
    gate.check_question()
    assert not gate.blocked


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), KeyError("label"), RecursionError()])
def test_a_moderator_that_fails_allows_nothing(error):
    assert let_through(["All is well. "], Failing(error))[0][-1] == FAILED
    assert judge(Failing(error), "q") == Verdict(False, "", FAILED)


@pytest.mark.parametrize("answer", [None, True, "allowed", Verdict(None), Verdict("no"), Verdict(1)])
def test_what_is_no_verdict_allows_nothing(answer):
    class Strange:
        def check(self, question, answer_so_far=None):
            return answer

    assert judge(Strange(), "q") == Verdict(False, "", FAILED)


def test_ctrl_c_is_no_failure_of_the_moderator():
    with pytest.raises(KeyboardInterrupt):
        judge(Failing(KeyboardInterrupt()), "q")


def test_a_warning_is_kept_and_the_text_is_shown():
    warning = Verdict(True, "needs caution", "Careful.", "warn")
    steps, gate = let_through(["So bad. ", "good"], Forbidding("bad.", verdict=warning))
    assert steps[-1] == "So bad. good"
    assert gate.verdict == warning

    class OnlyOnce:
        verdicts = iter([warning, Verdict(True)])

        def check(self, question, answer=None):
            return next(self.verdicts)

    assert let_through(["One. ", "two"], OnlyOnce())[1].verdict == warning
