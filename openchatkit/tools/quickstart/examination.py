"""The quickstart's examination: questions that were held out, put to a model through the real chat shell.

The shell runs as a process of its own, once, and reads its lines from a file, as a user would pipe them in. An answer
is right when it is the held-out sentence, character by character. Passages are given with the questions, or, with an
index, looked up by the shell.
"""

import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from openchatkit import cli, jsonl, paths
from openchatkit.errors import DEFECT, UserError
from openchatkit.progress import bar
from openchatkit.tools.quickstart.python_chats import FOLDER, HELD_OUT

# Printed by the shell at a command that says nothing about any question: what stands between two of these is a reply,
# of however many lines. Replies alone could not be told apart when a model writes several lines.
_MARK_COMMAND = "/hyperparameters"
_SEARCH = ("--retrieval-k", "1")  # the model has learnt to answer from one passage


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


@dataclass(frozen=True)
class SearchScore:
    """The same questions, asked without a passage: while the shell looks them up in an index, and while it does not."""

    on: list[Asked]
    off: list[Asked]

    @property
    def share(self) -> float:
        """Right answers among the questions that were looked up."""
        return sum(one.right for one in self.on) / len(self.on)


def bot_command(model: str, index: str | None = None) -> list[str]:
    """The chat shell on `model`, always taking the most probable token, with an index to look in if there is one."""
    command = [sys.executable, str(paths.ROOT / "inference" / "bot.py"), "--model", model, "--no-sample"]
    return command if index is None else [*command, "--retrieval", index, *_SEARCH]


def read_questions(path: Path) -> list[Question]:
    """The held-out questions of a file; UserError when it is not there or holds something else."""
    if not path.exists():
        raise UserError(f"no file {path}: run python data/python-docs/prepare.py first, or name one with --data")

    def refuse(number: int, error: Exception) -> NoReturn:
        raise UserError(f"{path}:{number}: expected an object with question, passage and answer") from error

    return list(jsonl.read(path, lambda row: Question(row["question"], row["passage"], row["answer"]), refuse))


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


def examine_search(questions: Sequence[Question], command: Sequence[str], *, count: int, seed: int) -> SearchScore:
    """Put `count` questions without their passages, twice: with retrieval on, then off. UserError as `examine`."""
    if count > len(questions):
        raise UserError(f"--questions {count}: there are {len(questions)} held-out entries: pass fewer")
    drawn = random.Random(seed).sample(list(questions), count)
    lines = [_MARK_COMMAND, _MARK_COMMAND]
    for switch in ("on", "off"):
        lines.append(f"/retrieval {switch}")
        for question in drawn:
            lines += ["/reset", question.question, _MARK_COMMAND, "/sources", _MARK_COMMAND]
    printed = iter(_replies(_run(command, lines)))
    asked = [Asked(question, reply=next(printed), passage=_found(next(printed))) for question in (*drawn, *drawn)]
    return SearchScore(asked[:count], asked[count:])


def _found(sources: str) -> str | None:
    """The passage in what /sources printed: a line that says where it is from, and the passage behind it."""
    lines = sources.splitlines()
    return lines[1].strip() if len(lines) > 1 else None


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


def _report(score: Score | SearchScore, *, show: int) -> None:
    if isinstance(score, SearchScore):
        shown = [*score.on[:show], *score.off[:1]]
        rows = [("looked up", score.on), ("not looked up", score.off)]
    else:
        shown = [*score.first_turn[:show], *score.without[:1]]
        rows = [
            ("with the passage", score.first_turn),
            ("with it, in a second turn", score.second_turn),
            ("without the passage", score.without),
        ]
    for one in shown:
        print(f">>> {one.question.question}")
        print(f"    passage: {one.passage or '(none)'}")
        print(f"    reply:   {one.reply}\n")
    for name, asked in rows:
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
    parser.add_argument(
        "--retrieval",
        metavar="INDEX",
        help="give no passages: ask with this index to look in (retrieval/build_index.py makes it), and without",
    )
    parser.add_argument("--show", type=cli.natural, default=4, help="how many answers to print")
    parser.add_argument("--seed", type=cli.natural, default=1, help="decides which questions are asked")
    parser.add_argument("--minimum", type=cli.non_negative_float, default=0.0, help="share of right answers to reach")
    args = parser.parse_args(argv)
    if args.minimum > 1:
        raise UserError(f"--minimum {args.minimum:g}: expected a share between 0 and 1")
    put = examine if args.retrieval is None else examine_search
    command = bot_command(args.model, args.retrieval)
    score = put(read_questions(args.data), command, count=args.questions, seed=args.seed)
    _report(score, show=args.show)
    if score.share >= args.minimum:
        return 0
    what = "with a passage" if args.retrieval is None else "that were looked up"
    print(f"below --minimum {args.minimum:.0%}: {score.share:.0%} of the questions {what} were answered right")
    return DEFECT
