"""The command's flags, its use without a terminal, and its README."""

import json
import re
import subprocess
import sys

import pytest

from openchatkit.inference import bot, report
from openchatkit.inference.shell.commands import Shell
from openchatkit.inference.shell.line_reader import MAX_LINE
from openchatkit.paths import ROOT

BOT = ROOT / "inference" / "bot.py"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "-1"], "argument --top-k: expected a whole number of at least 0, got '-1'"),
        (["--top-k", "many"], "argument --top-k: expected a whole number of at least 0, got 'many'"),
        (["--min-p", "nan"], "argument --min-p: expected a number of at least 0, got 'nan'"),
        (["--top-p", "1.5"], "top_p 1.5: expected a number above 0 and at most 1"),
        (["--max-tokens", "-3"], "argument --max-tokens: expected a whole number of at least 1, got '-3'"),
        (["--temperature", "nan"], "argument --temperature: expected a number of at least 0, got 'nan'"),
        (["--temperature", "-0.5"], "argument --temperature: expected a number of at least 0, got '-0.5'"),
        (["--temperature", "inf"], "argument --temperature: expected a number of at least 0, got 'inf'"),
        (["--seed", "-1"], "argument --seed: expected a whole number of at least 0, got '-1'"),
        (["--seed", str(1 << 63)], "argument --seed: expected a whole number below 2**63"),
        (["--gpu-id", "x"], "argument --gpu-id: expected a whole number of at least 0, got 'x'"),
        (["-g", "10"], "argument -g/--gpu-vram: expected ID:GiB such as 0:10, got '10'"),
        (["-g", "a:10"], "argument -g/--gpu-vram: expected ID:GiB such as 0:10, got 'a:10'"),
        (["-g", "0:ten"], "argument -g/--gpu-vram: expected a number of at least 0, got 'ten'"),
        (["-r", "0"], "argument -r/--cpu-ram: expected GiB above 0 and at most 1048576, got '0'"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (
            ["--retrieval", "/nosuch"],
            "/nosuch is not a folder: expected a retrieval index, as retrieval/build_index.py",
        ),
        (["--retrieval-k", "0"], "argument --retrieval-k: expected a whole number of at least 1, got '0'"),
        (["--prompt", " "], "--prompt is empty: expected a question"),
        (["--prompt", "caf\udce9"], "argument --prompt: expected UTF-8, character 4 is not"),
        (["--system", "\udcff"], "argument --system: expected UTF-8, character 1 is not"),
        (["--batch", "in.jsonl"], "--batch needs --output OUT.jsonl for its replies, or --output - for standard"),
        (["--output", "out.jsonl"], "--output is where the replies of --batch go: expected --batch IN.jsonl with it"),
        (["--batch", "a", "--output", "b", "--prompt", "hi"], "--batch answers each row by itself: leave out"),
        (["--load", "nosuch"], "there is no saved chat nosuch: there are none yet"),
        (["--load", "../up"], "'../up' cannot be the name of a chat: expected at most 64 letters"),
        (["--prom\x1bpt"], "unrecognized arguments: --prom\\x1bpt"),
    ],
)
def test_an_invalid_flag_is_one_line_and_status_2(piped, trained_model, flags, message):
    done = piped("hello\n", trained_model, *flags)
    assert done.stderr.decode().startswith(f"error: {message}")
    assert len(done.notes) == 1
    assert (done.stdout, done.status) == (b"", 2)


def test_a_closed_input_is_one_line():
    done = subprocess.run(["bash", "-c", f"{sys.executable} {BOT} <&-"], capture_output=True, timeout=60, check=False)
    assert done.stderr.decode().startswith("error: standard input is closed: expected a terminal, a pipe or a file")
    assert done.returncode == 2


def test_help_names_every_flag_of_the_original(piped, trained_model):
    shown = piped("", trained_model, "--help").stdout.decode()
    names = "gpu-id model max-tokens sample no-stream temperature top-k retrieval gpu-vram cpu-ram"
    assert [name for name in names.split() if f"--{name}" not in shown] == []
    assert "GPT-NeoXT-Chat-Base-20B" in "".join(shown.split())


def test_the_readme_names_every_flag_and_command():
    readme = (ROOT / "inference" / "README.md").read_text(encoding="utf-8").partition("\n## Server")[0]
    flags = {flag for action in bot.parser()._actions for flag in action.option_strings} - {"-h", "--help"}
    documented = re.findall(r"^\| (`-.*?) \|", readme, re.MULTILINE)
    assert sorted(set(re.findall(r"`(-[\w-]+)`", " ".join(documented)))) == sorted(flags)
    assert sorted(re.findall(r"^\| `/(\w+)", readme, re.MULTILINE)) == [
        name.removeprefix("do_") for name in sorted(vars(Shell)) if name.startswith("do_")
    ]


def test_the_readmes_commands_run(random_models, tmp_path, quick_python):
    readme = (ROOT / "inference" / "README.md").read_text(encoding="utf-8").partition("\n## Server")[0]
    blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    commands = [block for block in blocks if re.search(r"\||--batch", block)]
    assert len(commands) == 4
    for command in commands:
        command = command.replace("huggingface_models/NAME", str(random_models["neox"])).replace(
            "inference/bot.py", str(BOT)
        )
        command = command.replace("inference/README.md", "file.txt").replace("python ", f"{quick_python} ")
        (tmp_path / "file.txt").write_text("blue", encoding="utf-8")
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, cwd=tmp_path, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, (command, done)
        assert all(line.startswith("note: the reply was cut") for line in done.stderr.splitlines()), (command, done)
        assert done.stdout != "" or "--output" in command


# -- one question


def test_one_question_is_answered_and_piped_text_is_its_passage(pipe, trained_model):
    flags = ("--no-sample", "--no-date")
    done = pipe(b"red\n", trained_model, *flags, "--prompt", "say it")
    assert (done.stdout.decode(), done.stderr, done.status) == ("日本 red\n", b"", 0)


def test_a_question_on_the_command_line_is_never_a_command(piped, trained_model):
    done = piped("", trained_model, "--no-sample", "--no-date", "--json", "--prompt", "/quit")
    assert json.loads(done.stdout)["question"] == "/quit"


def test_one_question_that_cannot_be_answered_is_status_2(piped, trained_model):
    done = piped("word " * 300, trained_model, "--prompt", "say it")
    assert done.stdout == b"\n"
    assert done.notes[0].startswith("error: this needs ")
    assert (len(done.notes), done.status) == (1, 2)
    done = piped("x" * (MAX_LINE + 1), trained_model, "--prompt", "say it")
    assert done.notes == [f"error: the piped text is too long: expected at most {MAX_LINE} characters"]


def test_a_question_continues_a_saved_chat(piped, trained_model):
    flags = ("--no-sample", "--no-date")
    piped("hello\n/save a\n", trained_model, *flags)
    assert piped("", trained_model, *flags, "--load", "a", "--prompt", "hello").lines == ["again"]


def test_piped_bytes_that_are_not_utf8_are_replaced_with_a_note(piped, trained_model):
    done = piped(b"\xef\xbb\xbfre\xffd", trained_model, "--no-date", "--json", "--prompt", "say it")
    assert json.loads(done.stdout)["passages"] == ["re\ufffdd"]
    assert done.notes == ["note: the piped text is not all UTF-8; what is not was replaced by \ufffd"]


# -- JSON


def test_replies_as_json_are_one_object_a_line(piped, trained_model):
    script = f"/passage red\nsay it\n/set\n{'word ' * 300}\n/regen\nlines\n"
    done = piped(script, trained_model, "--no-sample", "--no-date", "--json")
    first, failed, again, last = map(json.loads, done.lines)
    assert list(first) == ["question", "reply", "finish", "tokens", "seconds", "dropped", "passages"]
    assert (first["question"], first["reply"], first["finish"]) == ("say it", "日本 red", "end")
    assert (first["dropped"], first["passages"]) == (0, ["red"])
    assert first["tokens"]["prompt"] > first["tokens"]["new"] > 3
    assert first["seconds"]["total"] >= first["seconds"]["first_token"] > 0
    assert failed["error"].startswith("this needs ")
    assert sorted(failed) == ["error", "question"]
    assert (again["question"], again["reply"], again["passages"]) == ("say it", "日本 red", ["red"])
    assert last["question"] == "lines"
    assert "temperature: 0.6" in done.notes
    assert done.status == 2


def test_json_is_safe_on_a_terminal():
    told = report.to_json({"question": "\x1b[31m \x9b31m \u202e \u2028 日本 \udcff"})
    assert told == '{"question": "\\u001b[31m \\u009b31m \\u202e \\u2028 日本 ?"}\n'
    assert json.loads(told)["question"] == "\x1b[31m \x9b31m \u202e \u2028 日本 ?"


# -- leaving


def test_an_output_that_cannot_be_written_is_one_line(trained_model, quick_python):
    done = subprocess.run(
        ["bash", "-c", f"yes hello | {quick_python} {BOT} --model {trained_model} > /dev/full"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.stderr.decode() == "error: standard output cannot be written: No space left on device\n"
    assert done.returncode == 2
