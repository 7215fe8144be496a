"""The quickstart's exam: held-out questions, put to a model through the real chat shell.

The shell runs as a process of its own, once, and reads its lines from a file, as a user would pipe them in. An answer
is right when it is the held-out sentence, character by character. Passages are given with the questions or, with an
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

# The shell's output for this command does not depend on the questions, so it separates replies of any number of lines.
_SEPARATOR_COMMAND = "/hyperparameters"
_SEARCH = ("--retrieval-k", "1")  # the model was trained to answer from one passage


@dataclass(frozen=True)
class HeldOutQuestion:
    """One held-out entry, as `python_chats` writes it."""

    question: str
    passage: str
    answer: str


_Chat = list[tuple[HeldOutQuestion, str | None]]


@dataclass(frozen=True)
class ExamAnswer:
    """A question, the passage given with it, and the reply."""

    question: HeldOutQuestion
    passage: str | None
    reply: str

    @property
    def right(self) -> bool:
        return self.reply == self.question.answer


@dataclass(frozen=True)
class ExamScore:
    """Answers to questions with their passage, with it after an earlier turn, and without it."""

    first_turn: list[ExamAnswer]
    second_turn: list[ExamAnswer]
    without: list[ExamAnswer]

    @property
    def share(self) -> float:
        """Share of right answers among all questions with a passage."""
        asked = [*self.first_turn, *self.second_turn]
        return sum(one.right for one in asked) / len(asked)


@dataclass(frozen=True)
class RetrievalScore:
    """Answers to the same questions without a passage: with retrieval on, and off."""

    on: list[ExamAnswer]
    off: list[ExamAnswer]

    @property
    def share(self) -> float:
        """Share of right answers among the questions that were looked up."""
        return sum(one.right for one in self.on) / len(self.on)


def bot_command(model: str, index: str | None = None) -> list[str]:
    """Return the command of a chat shell on `model` that decodes greedily, with an index for retrieval if given."""
    command = [sys.executable, str(paths.ROOT / "inference" / "bot.py"), "--model", model, "--no-sample"]
    return command if index is None else [*command, "--retrieval", index, *_SEARCH]


def read_questions(path: Path) -> list[HeldOutQuestion]:
    """Read the held-out questions of a file; UserError when it is missing or holds something else."""
    if not path.exists():
        raise UserError(f"no file {path}: run python data/python-docs/prepare.py first, or name one with --data")

    def refuse(number: int, error: Exception) -> NoReturn:
        raise UserError(f"{path}:{number}: expected an object with question, passage and answer") from error

    return list(jsonl.read(path, lambda row: HeldOutQuestion(row["question"], row["passage"], row["answer"]), refuse))


def examine(questions: Sequence[HeldOutQuestion], command: Sequence[str], *, count: int, seed: int) -> ExamScore:
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
    chats: list[_Chat] = [[(question, question.passage)] for question in first]
    for other, question in zip(first[:half], second, strict=True):
        chats.append([(other, other.passage), (question, question.passage)])
    chats += [[(question, None)] for question in without]
    asked = _put_questions(command, chats)
    return ExamScore(asked[:count], asked[count : count + half], asked[count + half :])


def examine_retrieval(
    questions: Sequence[HeldOutQuestion], command: Sequence[str], *, count: int, seed: int
) -> RetrievalScore:
    """Put `count` questions without their passages, twice: with retrieval on, then off. UserError as `examine`."""
    if count > len(questions):
        raise UserError(f"--questions {count}: there are {len(questions)} held-out entries: pass fewer")
    drawn = random.Random(seed).sample(list(questions), count)
    lines = [_SEPARATOR_COMMAND, _SEPARATOR_COMMAND]
    for switch in ("on", "off"):
        lines.append(f"/retrieval {switch}")
        for question in drawn:
            lines += ["/reset", question.question, _SEPARATOR_COMMAND, "/sources", _SEPARATOR_COMMAND]
    printed = iter(_split_replies(_run_shell(command, lines)))
    asked = [
        ExamAnswer(question, reply=next(printed), passage=_parse_sources(next(printed)))
        for question in (*drawn, *drawn)
    ]
    return RetrievalScore(asked[:count], asked[count:])


def _parse_sources(sources: str) -> str | None:
    """Return the passage in the output of /sources: a line on where it is from, then the passage."""
    lines = sources.splitlines()
    return lines[1].strip() if len(lines) > 1 else None


def _put_questions(command: Sequence[str], chats: Sequence[_Chat]) -> list[ExamAnswer]:
    """Hold each chat from the beginning; returns the answer to the last question of each."""
    lines = [_SEPARATOR_COMMAND, _SEPARATOR_COMMAND]
    for chat in chats:
        lines.append("/reset")
        for question, passage in chat:
            lines += [f"/passage {passage}"] if passage else []
            lines += [question.question, _SEPARATOR_COMMAND]
    replies = iter(_split_replies(_run_shell(command, lines)))
    return [[ExamAnswer(question, passage, next(replies)) for question, passage in chat][-1] for chat in chats]


def _run_shell(command: Sequence[str], lines: Sequence[str]) -> str:
    """Return what the shell prints for these lines."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stdin,
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        stdin.write("\n".join(lines) + "\n")
        stdin.flush()
        stdin.seek(0)
        with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8") as shell:
            assert shell.stdout is not None, command
            printed = _read_output(shell.stdout, total=lines.count(_SEPARATOR_COMMAND) - 2)
        if shell.returncode != 0:
            stderr.seek(0)
            last_line = (stderr.read().strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{Path(command[1]).name} ended with status {shell.returncode}: {last_line}")
    return printed


def _read_output(printed: IO[str], *, total: int) -> str:
    """Return all that is printed; a live line counts the replies."""
    lines, separator = [], ""
    with bar(total, "asking", unit="question") as progress:
        for line in printed:
            separator = separator or line
            lines.append(line)
            if line == separator and len(lines) > 1:
                progress.update()
    return "".join(lines)


def _split_replies(printed: str) -> list[str]:
    """Split the shell's output into replies. It begins with the separator, twice, which shows where one ends."""
    first_line = printed.split("\n", 1)[0] + "\n"
    separator = printed[: printed.find(first_line, 1)]
    assert printed.startswith(2 * separator), printed[:200]
    return [reply.strip() for reply in printed[2 * len(separator) :].split(separator)[:-1]]


def _print_report(score: ExamScore | RetrievalScore, *, show: int) -> None:
    if isinstance(score, RetrievalScore):
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
    put = examine if args.retrieval is None else examine_retrieval
    command = bot_command(args.model, args.retrieval)
    score = put(read_questions(args.data), command, count=args.questions, seed=args.seed)
    _print_report(score, show=args.show)
    if score.share >= args.minimum:
        return 0
    what = "with a passage" if args.retrieval is None else "that were looked up"
    print(f"below --minimum {args.minimum:.0%}: {score.share:.0%} of the questions {what} were answered right")
    return DEFECT
