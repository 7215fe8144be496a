"""The exam, of shells that are short scripts; the real one has the same commands, which its own tests prove."""

import json
import sys
from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.tools.quickstart import examination
from openchatkit.tools.quickstart.examination import HeldOutQuestion

QUESTIONS = [HeldOutQuestion(f"What does f{n} do?", f"f{n}: Return {n}.", f"Return {n}.") for n in range(40)]

# A shell that copies the passage of the question; `{reply}` says what it makes of the sentence.
SHELL = """
import sys
passage, turns, looking, found = None, 0, False, ""
for line in sys.stdin:
    line = line.strip()
    if line == "/hyperparameters":
        print("Hyperparameters:\\n  max_tokens: 128\\n  sample: False")
    elif line == "/reset":
        passage, turns = None, 0
    elif line.startswith("/passage "):
        passage = line.removeprefix("/passage ")
    elif line.startswith("/retrieval "):
        looking = line == "/retrieval on"
    elif line == "/sources":
        print(f"[1] f0, row 1, passages.jsonl (score 0.1)\\n    {{found}}" if found else "no passages")
    else:
        turns += 1
        found = "f0: Return 0." if looking and "f0" in line else ""
        passage = passage or found
        sentence = passage.split(": ", 1)[1] if passage else "I do not know."
        print({reply})
        passage = None
{end}
"""


@pytest.fixture
def shell(tmp_path):
    def write(reply: str = "sentence", end: str = "") -> list[str]:
        path = tmp_path / "shell.py"
        path.write_text(SHELL.format(reply=reply, end=end))
        return [sys.executable, str(path)]

    return write


def test_a_shell_that_copies_is_right_with_the_passage_and_wrong_without(shell):
    score = examination.examine(QUESTIONS, shell(), count=10, seed=1)
    assert [len(score.first_turn), len(score.second_turn), len(score.without)] == [10, 5, 5]
    assert score.share == 1.0
    assert not any(one.right for one in score.without)
    assert {one.reply for one in score.without} == {"I do not know."}
    asked = [one.question for one in (*score.first_turn, *score.second_turn, *score.without)]
    assert len(set(asked)) == 20
    assert [one.passage for one in score.first_turn] == [one.question.passage for one in score.first_turn]
    assert {one.passage for one in score.without} == {None}


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("sentence if turns == 1 else ''", 2 / 3),
        ("sentence + '\\n\\n  more\\n'", 0.0),
        ("'Hyperparameters:\\n' + sentence", 0.0),
        ("sentence.lower()", 0.0),
        ("'  ' + sentence + ' '", 1.0),
    ],
)
def test_replies_stay_with_their_questions(shell, reply, share):
    score = examination.examine(QUESTIONS, shell(reply), count=10, seed=1)
    assert score.share == pytest.approx(share)
    for one in (*score.first_turn, *score.second_turn):
        assert not one.reply or one.question.answer.lower() in one.reply.lower()


def test_the_seed_decides_what_is_asked(shell):
    first, same, other = (examination.examine(QUESTIONS, shell(), count=5, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_a_shell_that_fails_is_quoted(shell):
    command = shell(end="print('error: no such model', file=sys.stderr)\nsys.exit(2)")
    with pytest.raises(UserError, match=r"shell\.py ended with status 2: error: no such model"):
        examination.examine(QUESTIONS, command, count=5, seed=1)
    with pytest.raises(UserError, match=r"shell\.py ended with status 3: no output"):
        examination.examine(QUESTIONS, shell(end="sys.exit(3)"), count=5, seed=1)


def test_more_questions_than_there_are(shell):
    with pytest.raises(UserError, match="--questions 30 takes 60 held-out entries, there are 40: pass fewer"):
        examination.examine(QUESTIONS, shell(), count=30, seed=1)


def run(command: list[str], data: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(examination, "bot_command", lambda model, index: command)
    with pytest.raises(SystemExit) as ended:
        examination.main(["--data", str(data), "--questions", "10", *flags])
    return ended.value.code


def test_the_command_prints_answers_and_the_score(shell, tmp_path, monkeypatch, capsys):
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(json.dumps(vars(question)) + "\n" for question in QUESTIONS))
    command = shell("sentence if turns == 1 else ''")
    assert run(command, data, monkeypatch, "--show", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count(">>> What does f") == 3
    assert "    passage: (none)\n    reply:   I do not know.\n" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()[-3:]]
    assert lines == [
        "with the passage 10 of 10 right (100%)",
        "with it, in a second turn 0 of 5 right (0%)",
        "without the passage 0 of 5 right (0%)",
    ]
    assert run(command, data, monkeypatch, "--minimum", "0.6") == 0
    assert run(command, data, monkeypatch, "--minimum", "0.7") == 1
    assert "below --minimum 70%: 67% of the questions with a passage were answered right" in capsys.readouterr().out
    assert run(command, data, monkeypatch, "--minimum", "80") == 2
    assert "--minimum 80: expected a share between 0 and 1" in capsys.readouterr().err


def test_what_is_looked_up_counts_and_what_is_not_is_asked_again(shell):
    score = examination.examine_retrieval(QUESTIONS[:2], shell(), count=2, seed=1)
    assert sorted((one.question.question, one.passage, one.reply) for one in score.on) == [
        ("What does f0 do?", "f0: Return 0.", "Return 0."),
        ("What does f1 do?", None, "I do not know."),
    ]
    assert [(one.question, one.passage, one.right) for one in score.off] == [
        (one.question, None, False) for one in score.on
    ]
    assert score.share == 0.5
    with pytest.raises(UserError, match="--questions 3: there are 2 held-out entries: pass fewer"):
        examination.examine_retrieval(QUESTIONS[:2], shell(), count=3, seed=1)


def test_the_command_prints_what_was_looked_up(shell, tmp_path, monkeypatch, capsys):
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(json.dumps(vars(question)) + "\n" for question in QUESTIONS[:10]))
    assert run(shell(), data, monkeypatch, "--retrieval", "an.index", "--minimum", "0.1") == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed[-2:] == ["looked up 1 of 10 right (10%)", "not looked up 0 of 10 right (0%)"]
    assert run(shell(), data, monkeypatch, "--retrieval", "an.index", "--minimum", "0.2") == 1
    assert (
        "below --minimum 20%: 10% of the questions that were looked up were answered right" in capsys.readouterr().out
    )


def test_the_real_shell_is_asked_for_one_passage_from_the_index():
    assert examination.bot_command("m", "an.index")[-4:] == ["--retrieval", "an.index", "--retrieval-k", "1"]
    assert "--retrieval" not in examination.bot_command("m")


def test_questions_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no file .*heldout\.jsonl: run python data/python-docs/prepare\.py first"):
        examination.read_questions(tmp_path / "heldout.jsonl")
    path = tmp_path / "bad.jsonl"
    for line in ('{"question": "What?", "passage": "p: q."}', "no json", "[]"):
        path.write_text(json.dumps(vars(QUESTIONS[0])) + f"\n{line}\n")
        with pytest.raises(UserError, match=r"bad\.jsonl:2: expected an object with question, passage and answer"):
            examination.read_questions(path)
