"""The quickstart's examination: questions that were held out, put to a model through the real chat shell.

The shell runs as a process of its own, once, and reads its lines from a file, as a user would pipe them in. An answer
is right when it is the held-out sentence, character by character.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from openchatkit import cli, paths
from openchatkit.data.python_chats import FOLDER, HELD_OUT
from openchatkit.errors import DEFECT, UserError
from openchatkit.progress import bar

# Printed by the shell at a command that says nothing about any question: what stands between two of these is a reply,
# of however many lines. Replies alone could not be told apart when a model writes several lines.
_MARK_COMMAND = "/hyperparameters"


@dataclass(frozen=True)
class Question:
    """One held-out entry, as `data.python_chats` writes it."""

    question: str
    passage: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """A question as it was put, the passage that it had, and the reply."""

    question: Question
    passage: str | None
    reply: str

    @property
    def right(self) -> bool:
        return self.reply == self.question.answer


@dataclass(frozen=True)
class Score:
    """What was asked in three ways: with the passage, with it behind an earlier turn, and without it."""

    first_turn: list[Asked]
    second_turn: list[Asked]
    without: list[Asked]

    @property
    def share(self) -> float:
        """Right answers among all questions that had their passage."""
        asked = [*self.first_turn, *self.second_turn]
        return sum(one.right for one in asked) / len(asked)


def bot_command(model: str) -> list[str]:
    """The chat shell on `model`, always taking the most probable token."""
    return [sys.executable, str(paths.ROOT / "inference" / "bot.py"), "--model", model, "--no-sample"]


def read_questions(path: Path) -> list[Question]:
    """The held-out questions of a file; UserError when it is not there or holds something else."""
    if not path.exists():
        raise UserError(f"no file {path}: run python data/python-docs/prepare.py first, or name one with --data")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            questions.append(Question(record["question"], record["passage"], record["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: expected an object with question, passage and answer") from error
    return questions


def examine(questions: Sequence[Question], command: Sequence[str], *, count: int, seed: int) -> Score:
    """Put `count` questions with their passages, half as many in a second turn, and half as many without.

    `seed` decides which; `command` is the shell to run. UserError when there are too few, or the shell fails.
    """
    half = max(1, count // 2)
    if count + 2 * half > len(questions):
        raise UserError(
            f"--questions {count} takes {count + 2 * half} held-out entries, there are {len(questions)}: pass fewer"
        )
    drawn = random.Random(seed).sample(list(questions), count + 2 * half)
    first, second, without = drawn[:count], drawn[count : count + half], drawn[count + half :]
    chats = [
        *([(question, question.passage)] for question in first),
        *(
            [(other, other.passage), (question, question.passage)]
            for other, question in zip(first[:half], second, strict=True)
        ),
        *([(question, None)] for question in without),
    ]
    asked = _ask(command, chats)
    return Score(asked[:count], asked[count : count + half], asked[count + half :])


def _ask(command: Sequence[str], chats: Sequence[Sequence[tuple[Question, str | None]]]) -> list[Asked]:
    """Hold each chat from a fresh start; returns what was asked last in each."""
    lines = [_MARK_COMMAND, _MARK_COMMAND]
    for chat in chats:
        lines.append("/reset")
        for question, passage in chat:
            lines += [f"/passage {passage}"] if passage else []
            lines += [question.question, _MARK_COMMAND]
    replies = iter(_replies(_run(command, lines)))
    asked = []
    for chat in chats:
        for question, passage in chat:
            last = Asked(question, passage, next(replies))
        asked.append(last)
    return asked


def _run(command: Sequence[str], lines: Sequence[str]) -> str:
    """What the shell prints for these lines."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as given,
        tempfile.TemporaryFile("w+", encoding="utf-8") as notes,
    ):
        given.write("\n".join(lines) + "\n")
        given.flush()
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=notes, encoding="utf-8") as shell:
            printed = _follow(shell.stdout, total=lines.count(_MARK_COMMAND) - 2)
        if shell.returncode != 0:
            notes.seek(0)
            said = (notes.read().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{Path(command[1]).name} ended with status {shell.returncode}: {said}")
    return printed


def _follow(printed: IO[str], *, total: int) -> str:
    """All that is printed, with a live line that counts the replies."""
    lines, mark = [], ""
    with bar(total, "asking", unit="question") as progress:
        for line in printed:
            mark = mark or line
            lines.append(line)
            if line == mark and len(lines) > 1:
                progress.update()
    return "".join(lines)


def _replies(printed: str) -> list[str]:
    """Cut what the shell printed into replies. It begins with the mark, twice, which shows where one ends."""
    first_line = printed.split("\n", 1)[0] + "\n"
    mark = printed[: printed.find(first_line, 1)]
    assert printed.startswith(2 * mark), printed[:200]
    return [reply.strip() for reply in printed[2 * len(mark) :].split(mark)[:-1]]


def _report(score: Score, *, show: int) -> None:
    for one in [*score.first_turn[:show], *score.without[:1]]:
        print(f">>> {one.question.question}")
        print(f"    passage: {one.passage or '(none)'}")
        print(f"    reply:   {one.reply}\n")
    for name, asked in (
        ("with the passage", score.first_turn),
        ("with it, in a second turn", score.second_turn),
        ("without the passage", score.without),
    ):
        right = sum(one.right for one in asked)
        print(f"{name:26} {right:4} of {len(asked):3} right ({right / len(asked):.0%})")


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Ask, print some answers and the score; status 1 below `--minimum`."""
    parser = cli.Parser(
        prog="tools/quickstart_score.py",
        description="Put held-out questions to the quickstart's model through inference/bot.py; count right answers.",
    )
    default = paths.HUGGINGFACE_MODELS / "Quickstart"
    parser.add_argument("--model", default=str(default), help="folder of the converted model")
    parser.add_argument("--data", type=Path, default=FOLDER / HELD_OUT, help="the held-out questions")
    parser.add_argument("--questions", type=cli.positive_int, default=60, help="asked with their passage; twice in all")
    parser.add_argument("--show", type=cli.natural, default=4, help="how many answers to print")
    parser.add_argument("--seed", type=cli.natural, default=1, help="decides which questions are asked")
    parser.add_argument("--minimum", type=cli.non_negative_float, default=0.0, help="share of right answers to reach")
    args = parser.parse_args(argv)
    if args.minimum > 1:
        raise UserError(f"--minimum {args.minimum:g}: expected a share between 0 and 1")
    score = examine(read_questions(args.data), bot_command(args.model), count=args.questions, seed=args.seed)
    _report(score, show=args.show)
    if score.share >= args.minimum:
        return 0
    print(f"below --minimum {args.minimum:.0%}: {score.share:.0%} of the questions with a passage were answered right")
    return DEFECT
