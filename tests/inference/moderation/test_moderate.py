"""The command that judges texts: a table or JSON, a line a text, and exit statuses."""

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from moderation_rule import sentence

from openchatkit.inference.moderation import command, model_moderator, policy
from openchatkit.paths import ROOT


@pytest.fixture
def moderate(monkeypatch):
    """Run its main() with some text piped in: (lines on stdout, lines on stderr, exit status)."""

    def run(*flags: str | Path, sent: str | bytes = b"") -> tuple[list[str], list[str], int]:
        data = sent.encode() if isinstance(sent, str) else sent
        streams = [io.TextIOWrapper(io.BytesIO(content), encoding="utf-8") for content in (data, b"", b"")]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            command.main([str(flag) for flag in flags])
        for stream in streams[1:]:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode().splitlines() for stream in streams[1:])
        return out, err, ended.value.code

    return run


def test_a_table_of_the_lines_of_the_input(moderate, moderation_model):
    out, err, status = moderate(
        "--moderation-model", moderation_model, sent=b"we read a mat\n\n bomb the \x1b[31mcat\xff"
    )
    assert (err, status) == ([], 0)
    assert [line.split() for line in out] == [
        ["action", "label", "probability", "text"],
        ["allow", "casual", out[1].split()[2], "we", "read", "a", "mat"],
        ["block", "needs", "intervention", out[2].split()[3], "bomb", "the", "cat\ufffd"],
    ]
    assert out[0].index("text") == out[1].index("we") == out[2].index("bomb")
    assert 0.5 < float(out[1].split()[2]) <= 1


def test_json_and_a_policy_for_answers(moderate, moderation_model, tmp_path):
    rules = tmp_path / "policy.json"
    rules.write_text(json.dumps({"answers": {"needs caution": "warn"}}), encoding="utf-8")
    flags = ("--moderation-model", moderation_model, "--moderation-policy", rules, "--json", "--text", "steal\nthe cat")
    for part, action in (("question", "allow"), ("answer", "warn")):
        out, _, status = moderate(*flags, "--as", part)
        (judged,) = map(json.loads, out)
        assert judged.pop("probability") > 0.5
        assert judged == {"text": "steal\nthe cat", "label": "needs caution", "action": action, "allowed": True}
        assert status == 0


def test_a_long_text_is_shown_in_part_and_judged_as_a_whole(moderate, moderation_model):
    out, _, _ = moderate("--moderation-model", moderation_model, "--text", f"{'the cat sits ' * 30} bomb", "")
    assert out[1].startswith("block ")
    assert out[1].endswith("...")
    assert out[2].split() == ["allow", "(nothing)"]


def test_a_text_that_cannot_be_judged_is_blocked_and_ends_in_status_2(moderate, moderation_model, monkeypatch):
    def fails(self, text, *, expired):
        if "hello" not in text.lower():
            raise RuntimeError("broken")
        return judged(self, text, expired=expired)

    judged = model_moderator.LabelScorer.score
    monkeypatch.setattr(model_moderator.LabelScorer, "score", fails)
    out, err, status = moderate("--moderation-model", moderation_model, sent="hello\nothers\nhello\n")
    assert [line.split()[0] for line in out[1:]] == ["allow", "block", "allow"]
    assert out[2].split()[1:3] == ["(not", "judged)"]
    assert err == ["moderation failed, so this question is not allowed: broken"]
    assert status == 2
    out, _, _ = moderate("--moderation-model", moderation_model, "--json", "--text", "others")
    assert json.loads(out[0]) == {
        "text": "others",
        "label": None,
        "probability": None,
        "action": "block",
        "allowed": False,
        "reason": "broken",
    }


def test_the_policy_is_shown_as_a_file_to_start_from(moderate, tmp_path):
    out, _, status = moderate("--show-policy")
    (tmp_path / "mine.yaml").write_text("\n".join(out), encoding="utf-8")
    assert policy.load(tmp_path / "mine.yaml") == policy.Policy()
    assert status == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--moderation-model is missing: expected a folder or hub name"),
        (("--moderation-model", "{tmp}/none"), r"the moderation model: --model .*/none: no such folder"),
        (("--moderation-policy", "{tmp}/none"), "--moderation-model is missing"),
        (("--show-policy", "--moderation-policy", "{tmp}/none"), "/none cannot be read: No such file"),
        (("--moderation-model", "{tmp}", "--moderation-policy", "{tmp}/bad.yaml"), "threshold is 2: expected a number"),
        (("--as", "chat"), "argument --as: invalid choice: 'chat'"),
    ],
)
def test_what_will_not_do_is_said_in_a_line(moderate, tmp_path, flags, message):
    (tmp_path / "bad.yaml").write_text("threshold: 2", encoding="utf-8")
    out, err, status = moderate(*(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    assert (out, status, len(err)) == ([], 2, 1)
    assert err[0].startswith("error: ")
    assert re.search(message, err[0]), err[0]


def test_a_line_without_end_is_refused(moderate, moderation_model):
    out, err, status = moderate("--moderation-model", moderation_model, sent="hello\n" + "a" * ((1 << 20) + 2))
    assert len(out) == 2
    assert err == ["error: line 2 of the input is too long: expected at most 1048576 characters"]
    assert status == 2


def test_as_a_process(moderation_model, quick_python):
    done = subprocess.run(
        [quick_python, ROOT / "inference" / "moderate.py", "--moderation-model", moderation_model, "--json"],
        input=sentence(random.Random(3), "bomb"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout)["action"] == "block"
