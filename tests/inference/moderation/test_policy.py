"""What labels lead to, and what is said of a policy file that will not do."""

import json
import re
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openchatkit.errors import UserError
from openchatkit.formats import moderation
from openchatkit.formats.moderation import LABELS
from openchatkit.inference.moderation import policy
from openchatkit.inference.moderation.policy import ACTIONS, Policy
from openchatkit.paths import ROOT

PROBABILITIES = st.lists(st.floats(0.001, 1), min_size=5, max_size=5).map(lambda p: [x / sum(p) for x in p])


def probabilities(**given: float) -> list[float]:
    """Of the labels in their order; what is left goes to "casual"."""
    rest = {name.replace("_", " "): p for name, p in given.items()}
    return [1 - sum(rest.values()), *(rest.get(label, 0.0) for label in LABELS[1:])]


@pytest.fixture
def written(tmp_path):
    """Write a policy file and load it."""

    def write(text: str, name: str = "policy.yaml") -> Policy:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return policy.load(path)

    return write


def test_by_default_an_intervention_is_what_blocks():
    default = Policy()
    for part in ("question", "answer"):
        decide = lambda part=part, **given: default.decide(part, [probabilities(**given)])  # noqa: E731
        assert decide(needs_intervention=0.51) == policy.Decision("block", "needs intervention", 0.51)
        assert decide(needs_intervention=0.3, needs_caution=0.29, possibly_needs_caution=0.2).action == "block"
        assert decide(needs_intervention=0.3).action == "allow"
        assert decide(needs_caution=0.9) == policy.Decision("allow", "needs caution", 0.9)


def test_labels_that_ask_for_an_action_add_up(written):
    rules = written("questions: {needs caution: block, probably needs caution: warn}\nthreshold: 0.4")
    assert rules.decide("question", [probabilities(needs_intervention=0.2, needs_caution=0.25)]).action == "block"
    decision = rules.decide("question", [probabilities(needs_caution=0.25, probably_needs_caution=0.2)])
    assert decision == policy.Decision("warn", "needs caution", 0.25)
    assert rules.decide("answer", [probabilities(needs_caution=0.25, probably_needs_caution=0.2)]).action == "allow"


def test_the_worst_window_decides(written):
    rules = written("answers: {needs caution: warn}")
    harmless, grave = probabilities(), probabilities(needs_intervention=0.8)
    worse = probabilities(needs_intervention=0.9)
    for windows in ([harmless, grave, harmless], [grave, probabilities(needs_caution=1.0)]):
        assert rules.decide("answer", windows) == policy.Decision("block", "needs intervention", 0.8)
    assert rules.decide("answer", [worse, grave, worse]).probability == 0.9
    assert rules.decide("answer", [harmless, probabilities(needs_caution=1.0)]).action == "warn"


@given(PROBABILITIES, st.dictionaries(st.sampled_from(LABELS), st.sampled_from(ACTIONS)), st.floats(0.01, 1))
def test_a_stricter_policy_never_does_less(window, actions, threshold):
    base = {label: actions.get(label, "allow") for label in LABELS}
    mild = Policy(questions=base, threshold=threshold).decide("question", [window])
    for label in LABELS:
        for action in ACTIONS[ACTIONS.index(base[label]) :]:
            strict = Policy(questions=base | {label: action}, threshold=threshold).decide("question", [window])
            assert ACTIONS.index(strict.action) >= ACTIONS.index(mild.action)
    lower = Policy(questions=base, threshold=threshold / 2).decide("question", [window])
    assert ACTIONS.index(lower.action) >= ACTIONS.index(mild.action)


def test_a_policy_is_read_back_as_it_is_written(written):
    rules = written("questions: {casual: warn}\nmessages: {warning: 'sei höflich: {label}'}\nseconds: 5")
    assert written(rules.to_yaml()) == rules
    assert written(json.dumps({"threshold": 1}), "policy.json") == Policy(threshold=1.0)
    assert written("") == Policy()
    assert written(Policy().to_yaml()) == Policy()


def test_the_documentation_shows_the_default(written):
    text = (ROOT / "docs" / "moderation.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert written(shown) == Policy()
    indented = re.search(r"(?m)(^    .*\n|^\n)+(?=\nand the probability)", text)[0]
    assert textwrap.dedent(indented).strip() == moderation.prompt("the text, on one line")


def test_a_policy_in_one_line(written):
    rules = written("questions: {needs caution: warn}\nanswers: {needs intervention: allow}\nthreshold: 0.25")
    assert rules.describe() == (
        "questions: block on needs intervention, warn on needs caution; answers: allow all; "
        "from a probability of 0.25, or as the most probable label"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold: 0.5", "unknown setting 'treshold': expected questions, answers, threshold, label_share, seconds"),
        ("questions: {dangerous: block}", "questions: unknown label 'dangerous': expected casual, needs caution, need"),
        ("answers: {casual: forbid}", "answers: casual has the action 'forbid': expected allow, warn, block"),
        ("answers: {casual: no}", "casual has the action 'False'"),
        ("answers: {casual: [block]}", r"casual has the action \"\['block'\]\""),
        ("questions: block", "questions: expected labels with their actions"),
        ("threshold: 1.01", "threshold is 1.01: expected a number above 0 and at most 1"),
        ("threshold: 0", "threshold is 0: expected a number above 0"),
        ("threshold: -0.5", "threshold is -0.5"),
        ("threshold: .nan", "threshold is nan"),
        ("threshold: true", "threshold is True"),
        ("threshold: half", "threshold is half"),
        ("label_share: 2", "label_share is 2: expected a number of at least 0 and at most 1"),
        ("seconds: .inf", "seconds is inf"),
        ("messages: {question: ''}", "messages: question is not a text"),
        ("messages: {sorry: a}", "messages: unknown message 'sorry': expected question, answer, warning, unjudged"),
        ("messages: sorry", "messages: expected texts by name"),
        ("- block", "expected settings by name"),
        ("a: [", "is not a .yaml file: while parsing"),
        ("!!python/object/apply:os.system [ls]", "is not a .yaml file: could not determine a constructor"),
    ],
)
def test_a_policy_that_will_not_do(written, text, message):
    with pytest.raises(UserError, match=f"^--moderation-policy .*policy.yaml.*{message}"):
        written(text)


def test_a_policy_file_that_cannot_be_read(tmp_path, written):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        policy.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        policy.load(tmp_path)
    with pytest.raises(UserError, match=r"is not a \.json file: Expecting"):
        written("a: 1", "policy.json")
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"is not a \.yaml file: 'utf-8' codec"):
        policy.load(tmp_path / "bytes")
    with pytest.raises(UserError, match="too long to be a policy"):
        written("#" * (2 << 20))
