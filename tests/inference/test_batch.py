"""Batches: rows in, a line each out, stopped and gone on with."""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

from openchatkit.errors import UserError
from openchatkit.inference.batch import questions
from openchatkit.paths import ROOT
from openchatkit.storage import try_lock

BOT = ROOT / "inference" / "bot.py"
GREEDY = ("--no-sample",)


@pytest.fixture
def batch(piped, tmp_path):
    """Run a batch of rows, objects or bytes, into out.jsonl; the run and the lines."""

    def run(given, model, *flags, output=tmp_path / "out.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in given]
        (tmp_path / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        done = piped("", model, "--batch", str(tmp_path / "in.jsonl"), "--output", str(output), *flags)
        out = done.stdout if output == "-" else output.read_bytes() if output.is_file() else b""
        return done, [json.loads(line) for line in out.splitlines()]

    return run


def test_each_row_is_answered_by_itself_and_in_order(batch, trained_model):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "hello"},
    ]
    given = [
        {"prompt": "hello"},
        {"messages": messages, "id": "two"},
        b"",
        {"prompt": "say it", "passages": ["red"], "id": 3},
        {"prompt": "lines", "max_tokens": 1},
    ]
    done, lines = batch(given, trained_model, *GREEDY)
    assert [line["reply"] for line in lines][:3] == ["first", "again", "日本 red"]
    assert [line["line"] for line in lines] == [1, 2, 4, 5]
    assert [line.get("id") for line in lines] == [None, "two", 3, None]
    assert [line["finish"] for line in lines] == ["end", "end", "end", "length"]
    assert lines[2]["passages"] == ["red"]
    assert lines[3]["tokens"]["new"] == 1
    assert (done.stdout, done.stderr, done.status) == (b"", b"", 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "the row is not JSON: "),
        (b"[" * 100_000, "the row is not JSON: "),
        (b"7", "the row is not a JSON object: expected one with prompt or messages"),
        (b'{"prompt": "\xff"}', "byte 13 of the row is not UTF-8"),
        (rb'{"prompt": "\ud800"}', "the row holds half of a surrogate pair, which is not a character"),
        ({"prompt": " "}, "prompt is not text, or is empty"),
        ({"prompt": 1}, "prompt is not text, or is empty"),
        ({}, "expected either prompt or messages"),
        ({"prompt": "a", "messages": []}, "expected either prompt or messages"),
        ({"prompt": "a", "temprature": 1}, "unknown key 'temprature': expected prompt, messages, passages, system, "),
        ({"prompt": "a", "passages": "b"}, "passages is not a list of strings"),
        ({"prompt": "a", "system": 1}, "system is not text"),
        ({"prompt": "a", "id": 1.5}, "id is neither a text nor a whole number"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens 0: expected a whole number of at least 1"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens True: expected a whole number of at least 1"),
        ({"prompt": "a", "max_tokens": float("nan")}, "max_tokens nan: expected a whole number of at least 1"),
        ({"messages": "a"}, "messages is not a list"),
        ({"messages": []}, "the messages have no question to answer: expected a text of the role user"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1 has the role 'robot': expected system, user,"),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]},
            "there is a system text twice: expected it in system or in messages",
        ),
    ],
)
def test_a_row_that_asks_nothing_is_refused(row, message):
    data = row if isinstance(row, bytes) else json.dumps(row).encode()
    with pytest.raises(UserError) as refused:
        questions.parse_question(questions.decode(questions.BatchRow(1, data)))
    assert str(refused.value).startswith(message)


def test_a_bad_row_is_an_error_in_its_line_and_the_others_are_done(batch, trained_model):
    given = [{"prompt": "hello"}, b'{"prompt": "\xff"}', {"prompt": "word " * 300, "id": "long"}, {"prompt": "hello"}]
    done, lines = batch(given, trained_model, *GREEDY)
    assert [line.get("reply") for line in lines] == ["first", None, None, "first"]
    assert lines[1]["error"] == "byte 13 of the row is not UTF-8"
    assert lines[2]["id"] == "long"
    assert lines[2]["error"].startswith("this needs ")
    assert done.notes == ['error: 2 of 4 rows could not be answered: see "error" in their lines']
    assert done.status == 2
    # So says a later run too, which finds nothing left to do.
    assert batch(given, trained_model, *GREEDY)[0].notes == done.notes


def test_a_row_beyond_the_limit_is_an_error_and_the_next_is_read(batch, trained_model, monkeypatch):
    monkeypatch.setattr(questions, "SIZE_LIMIT", 100)
    _, lines = batch([{"prompt": "x" * 350}, {"prompt": "hello"}], trained_model, *GREEDY)
    assert lines[0]["error"] == "the row is too long: expected at most 100 bytes"
    assert (lines[1]["line"], lines[1]["reply"]) == (2, "first")


def test_the_system_text_is_the_rows_or_else_the_flags(batch, trained_model):
    given = [{"prompt": "hello"}, {"prompt": "hello", "system": "Be kind to me."}, {"prompt": "hello", "system": ""}]
    _, lines = batch(given, trained_model, *GREEDY, "--system", "Be")
    none, row, empty = (line["tokens"]["prompt"] for line in lines)
    assert row > none > empty


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(batch, random_models, tmp_path):
    model, given = random_models["neox"], [{"prompt": f"question {number}"} for number in range(6)]
    flags = ("--seed", "7", "--max-tokens", "12")
    _, whole = batch(given, model, *flags)
    out = tmp_path / "out.jsonl"
    three = out.read_bytes().splitlines(keepends=True)[:3]
    out.write_bytes(b"".join(three) + b'{"line": 4, "row": "cut he')
    done, resumed = batch(given, model, *flags)
    assert out.read_bytes().startswith(b"".join(three))
    assert [line["reply"] for line in resumed] == [line["reply"] for line in whole]
    assert done.status == 0
    # Each row has draws of its own, and others with another seed.
    same, _, _ = (batch([{"prompt": "question"}] * 3, model, *flags, output=tmp_path / "same.jsonl"))[1]
    other, _, _ = (batch([{"prompt": "question"}] * 3, model, *flags[2:], "--seed", "8", output=tmp_path / "8.jsonl"))[
        1
    ]
    assert same["reply"] != other["reply"]


def test_a_finished_batch_needs_no_model(batch, trained_model, tmp_path):
    given = [{"prompt": "hello"}]
    batch(given, trained_model, *GREEDY)
    (trained_model / "config.json").rename(tmp_path / "config.json")
    try:
        done, lines = batch(given, trained_model, *GREEDY)
    finally:
        (tmp_path / "config.json").rename(trained_model / "config.json")
    assert ([line["reply"] for line in lines], done.status) == (["first"], 0)


def test_an_output_of_something_else_is_refused_and_kept(batch, piped, trained_model, tmp_path):
    given = [{"prompt": "hello"}, {"prompt": "lines"}]
    out = tmp_path / "out.jsonl"
    batch(given, trained_model, *GREEDY)
    kept = out.read_bytes()
    for changed, flags in (
        ([{"prompt": "hullo"}, {"prompt": "lines"}], GREEDY),
        (given[:1], GREEDY),
        (given, (*GREEDY, "--max-tokens", "9")),
        (given, (*GREEDY, "--system", "Be kind.")),
    ):
        done, _ = batch(changed, trained_model, *flags)
        assert done.notes[0].startswith("error: line ")
        assert "is not a reply to this input with these settings: give the input and flags that it was" in done.notes[0]
        assert (done.status, out.read_bytes()) == (2, kept)
    for diary in (b"a diary\n", b"a diary", kept + b"and notes"):
        out.write_bytes(diary)
        done = piped("", trained_model, *GREEDY, "--batch", str(tmp_path / "in.jsonl"), "--output", str(out))
        assert (done.status, out.read_bytes()) == (2, diary)


def test_files_that_cannot_be_are_one_line_each(batch, piped, trained_model, tmp_path):
    given = [{"prompt": "hello"}]
    (tmp_path / "out.jsonl").touch()
    with try_lock(tmp_path / "out.jsonl"):
        done, _ = batch(given, trained_model)
        assert done.notes == [
            f"error: another run is writing {tmp_path}/out.jsonl: wait for it, or give another --output"
        ]
    done, _ = batch(given, trained_model, output=tmp_path / "in.jsonl")
    assert done.notes == [f"error: --output {tmp_path}/in.jsonl is the input: expected another file"]
    done, _ = batch(given, trained_model, output=tmp_path / "nosuch" / "out.jsonl")
    assert done.notes == [f"error: --output {tmp_path}/nosuch/out.jsonl cannot be written: No such file or directory"]
    done, _ = batch(given, trained_model, output=tmp_path)
    assert done.notes == [f"error: --output {tmp_path} is not a plain file: expected one, or - for standard output"]
    done = piped("", trained_model, "--batch", str(tmp_path / "none"), "--output", "-")
    assert done.notes == [f"error: --batch {tmp_path}/none cannot be read: No such file or directory"]
    done = piped("", trained_model, "--batch", str(tmp_path), "--output", "-")
    assert done.notes == [f"error: --batch {tmp_path} cannot be read: Is a directory"]
    assert done.status == 2


def test_from_standard_input_to_standard_output(piped, trained_model):
    given = b'\xef\xbb\xbf{"prompt": "hello", "id": "\xe6\x97\xa5"}\r\n\r\n{"prompt": "lines"}'
    done = piped(given, trained_model, *GREEDY, "--batch", "-", "--output", "-")
    lines = [json.loads(line) for line in done.lines]
    assert [(line["line"], line["reply"]) for line in lines] == [(1, "first"), (3, "two\nlines")]
    assert "日" in done.stdout.decode()
    assert (done.stderr, done.status) == (b"", 0)


def test_a_disk_that_is_full_is_one_line_and_what_was_written_is_gone_on_from(batch, trained_model, tmp_path):
    given = [{"prompt": "hello"}] * 12
    _, whole = batch(given, trained_model, *GREEDY, output=tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    flags = ("--batch", tmp_path / "in.jsonl", "--output", out, "--model", trained_model, *GREEDY)
    done = subprocess.run(
        [sys.executable, BOT, *flags],
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)),
        timeout=120,
        check=False,
    )
    assert done.stderr.decode() == f"error: {out} cannot be written: File too large; run again to go on\n"
    assert (done.returncode, out.stat().st_size) == (2, 1500)
    _, resumed = batch(given, trained_model, *GREEDY)
    assert [line["reply"] for line in resumed] == [line["reply"] for line in whole]


def test_ctrl_c_ends_a_batch_after_the_last_whole_row(trained_model, endless_model, tmp_path, quick_python):
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text('{"prompt": "a", "max_tokens": 3}\n{"prompt": "b"}\n')
    command = [quick_python, BOT, "--model", endless_model, "--max-tokens", "900000"]
    run = subprocess.Popen([*command, "--batch", given, "--output", out], stderr=subprocess.PIPE)
    while not (out.exists() and out.read_bytes().endswith(b"\n")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1] == b"interrupted\n"
    assert run.returncode == 130
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1]
