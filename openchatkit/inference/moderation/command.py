"""The command `inference/moderate.py`: texts in, verdicts out, a line each."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from openchatkit import cli, progress
from openchatkit.errors import USER_ERROR, UserError
from openchatkit.formats.moderation import LABELS
from openchatkit.inference.moderation import flags, policy
from openchatkit.texts import MAX_LINE, shorten

if TYPE_CHECKING:
    from openchatkit.inference.moderation.moderator import Verdict

_WIDTH = max(map(len, LABELS))
_SHOWN = 80  # characters of a text in the table


def parser() -> cli.Parser:
    """Return the parser of the flags of moderation, and of the texts to judge."""
    given = cli.Parser(
        prog="inference/moderate.py",
        description="Judge texts with a moderation model and a policy: those of --text, else the lines of the input. "
        "The exit status is 2 when a text could not be judged.",
    )
    flags.add_flags(given)
    given.add_argument("--text", nargs="+", metavar="TEXT", help="texts to judge, instead of the lines of the input")
    given.add_argument(
        "--as",
        dest="part",
        choices=(policy.QUESTION, policy.ANSWER),
        default=policy.QUESTION,
        help="judge the texts as questions or as answers, for which the policy may differ",
    )
    given.add_argument("--json", action="store_true", help="an object a line instead of a table")
    given.add_argument("--show-policy", action="store_true", help="print the policy in full, as a file to start from")
    return given


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Judge every text; each line of output is written as soon as it is known."""
    given = parser().parse_args(argv)
    if given.show_policy:
        sys.stdout.write(flags.read_policy(given).to_yaml())
        return 0
    if given.moderation_model is None:
        raise UserError("--moderation-model is missing: expected a folder or hub name of a model that judges texts")
    texts = _open_input() if given.text is None else given.text
    moderator = flags.load_moderator(given, progress.announce)
    assert moderator is not None
    progress.announce(moderator.describe())
    if not given.json:
        print(f"{'action':6}  {'label':{_WIDTH}}  probability  text", flush=True)
    failed = False
    for text in texts:
        verdict = moderator.judge(text, given.part)
        failed = failed or bool(verdict.reason)
        print(_format_json(text, verdict) if given.json else _format_row(text, verdict), flush=True)
    return USER_ERROR if failed else 0


def _open_input() -> Iterator[str]:
    if sys.stdin is None:
        raise UserError("standard input is closed: expected texts there, a line each, or --text")
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return _read_lines()


def _read_lines() -> Iterator[str]:
    number = 0
    while line := sys.stdin.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE and not line.endswith("\n"):
            raise UserError(f"line {number} of the input is too long: expected at most {MAX_LINE} characters")
        if line.strip():
            yield line.strip()


def _format_json(text: str, verdict: "Verdict") -> str:
    return json.dumps(
        {
            "text": text,
            "label": verdict.label or None,
            "probability": round(verdict.probability, 4) if verdict.label else None,
            "action": verdict.action,
            "allowed": verdict.allowed,
            **({"reason": verdict.reason} if verdict.reason else {}),
        }
    )


def _format_row(text: str, verdict: "Verdict") -> str:
    from openchatkit.inference.streaming import clean

    shown = shorten(clean(text), _SHOWN)
    unlabelled = "(not judged)" if verdict.reason else "(nothing)"
    probability = f"{verdict.probability:11.2f}" if verdict.label else " " * 11
    return f"{verdict.action:6}  {verdict.label or unlabelled:{_WIDTH}}  {probability}  {shown}"
