"""The policy: which action each label leads to, from which probability on, and which messages are shown.

It comes from a file that a person can read and change; `Policy().to_yaml()` is the default in that form. `scorer` gives
the probabilities; this module alone decides what happens to a text.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.formats.moderation import LABELS
from openchatkit.texts import reason_of

ACTIONS = ("allow", "warn", "block")  # from the mildest to the strictest
QUESTION, ANSWER = "question", "answer"

# As in the original kit, only an intervention stops a chat; a policy can give the other labels an action too.
_ACTIONS = {label: "block" if label == "needs intervention" else "allow" for label in LABELS}
_MESSAGES = {
    QUESTION: "I'm sorry, I can't answer this request.",
    ANSWER: "I'm sorry, I can't go on with this answer.",
    "warning": "moderation: {label}",
    "unjudged": "I'm sorry, this could not be checked by the moderation model, so I don't answer it.",
}
_MAX_FILE = 1 << 20  # bytes


@dataclass(frozen=True)
class Decision:
    """The action to take, the label that decided it and that label's probability."""

    action: str
    label: str
    probability: float


@dataclass(frozen=True)
class Policy:
    """The actions that labels of questions and of answers lead to.

    An action is taken when the most probable label asks for it or for a stricter one, or when all such labels together
    reach `threshold`. `label_share` is the least probability that the five labels must have together: below it the
    model prefers to say something else, and has not judged. `seconds` is the longest that judging a text may take.
    `messages` are "question" and "answer" for blocked texts, "warning", and "unjudged".
    """

    questions: Mapping[str, str] = field(default_factory=lambda: dict(_ACTIONS))
    answers: Mapping[str, str] = field(default_factory=lambda: dict(_ACTIONS))
    threshold: float = 0.5
    label_share: float = 0.01
    seconds: float = 60.0
    messages: Mapping[str, str] = field(default_factory=lambda: dict(_MESSAGES))

    def decide(self, part: str, windows: Sequence[Sequence[float]]) -> Decision:
        """Decide by the worst of a text's windows, each given as the probabilities of `LABELS` in their order.

        `part` is "question" or "answer".
        """
        actions = self.questions if part == QUESTION else self.answers
        return max((self._weigh(actions, window) for window in windows), key=lambda weighed: weighed[0])[1]

    def _weigh(self, actions: Mapping[str, str], probabilities: Sequence[float]) -> tuple[tuple[int, float], Decision]:
        """Return a decision and its severity, which compares as a tuple."""
        by_label = dict(zip(LABELS, probabilities, strict=True))
        first = max(by_label, key=by_label.__getitem__)
        for rank in range(len(ACTIONS) - 1, 0, -1):
            asking = {label: p for label, p in by_label.items() if ACTIONS.index(actions[label]) >= rank}
            if first in asking or (asking and sum(asking.values()) >= self.threshold):
                label = max(asking, key=asking.__getitem__)
                return (rank, sum(asking.values())), Decision(ACTIONS[rank], label, by_label[label])
        return (0, 1 - by_label[LABELS[0]]), Decision(ACTIONS[0], first, by_label[first])

    def describe(self) -> str:
        """Return the policy in one line."""
        parts = (("questions", self.questions), ("answers", self.answers))
        said = [f"{name}: {_summarize(actions)}" for name, actions in parts]
        return "; ".join([*said, f"from a probability of {self.threshold:g}, or as the most probable label"])

    def to_yaml(self) -> str:
        """Return the policy as the YAML that `load` reads."""
        import yaml

        settings = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)


def load(path: Path) -> Policy:
    """Read a policy from a JSON (`.json`) or YAML file; settings that it does not name are the default's.

    UserError, in one line, for a file that cannot be read, unknown keys, labels and actions, and numbers out of range.
    """
    given = _read(Path(path))
    checks: dict[str, Callable[[object, str], Any]] = {
        "questions": _parse_actions,
        "answers": _parse_actions,
        "threshold": lambda value, what: _parse_number(value, what, above=0, most=1),
        "label_share": lambda value, what: _parse_number(value, what, least=0, most=1),
        "seconds": lambda value, what: _parse_number(value, what, above=0, most=3600),
        "messages": _parse_messages,
    }
    where = f"--moderation-policy {path}"
    _check_names(given, checks, f"{where}: unknown setting")
    return replace(Policy(), **{name: checks[name](value, f"{where}: {name}") for name, value in given.items()})


def _read(path: Path) -> Mapping[str, object]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_FILE + 1)
        if len(text) > _MAX_FILE:
            raise UserError(f"--moderation-policy {path} is too long to be a policy")
        given = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--moderation-policy {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = reason_of(error)
        raise UserError(f"--moderation-policy {path} is not a {path.suffix or '.yaml'} file: {reason}") from error
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f"--moderation-policy {path}: expected settings by name, such as `threshold: 0.5`")
    return given


def _check_names(given: Iterable[object], expected: Collection[str], what: str) -> None:
    if unknown := [key for key in given if key not in expected]:
        raise UserError(f"{what} {str(unknown[0])[:50]!r}: expected {', '.join(expected)}")


def _parse_actions(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected labels with their actions, such as `needs caution: warn`")
    _check_names(value, LABELS, f"{what}: unknown label")
    for label, action in value.items():
        if action not in ACTIONS:
            raise UserError(f"{what}: {label} has the action {str(action)[:50]!r}: expected {', '.join(ACTIONS)}")
    return {**_ACTIONS, **value}


def _parse_messages(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"{what}: expected texts by name, such as `question: I can't answer this.`")
    _check_names(value, _MESSAGES, f"{what}: unknown message")
    for name, text in value.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{what}: {name} is not a text: expected the message to show")
    return {**_MESSAGES, **{name: text.strip() for name, text in value.items()}}


def _parse_number(
    value: object, what: str, *, most: float, least: float = -math.inf, above: float = -math.inf
) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (above < number <= most and number >= least):
        lowest = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise UserError(f"{what} is {str(value)[:50]}: expected a number {lowest} and at most {most:g}")
    return float(number)


def _summarize(actions: Mapping[str, str]) -> str:
    found = [(action, [label for label in LABELS if actions[label] == action]) for action in ACTIONS[:0:-1]]
    said = [f"{action} on {', '.join(labels)}" for action, labels in found if labels]
    return ", ".join(said) or "allow all"
