"""The real command, driven through a pipe and through a pseudo-terminal."""

import os
import re
import subprocess
import sys

import pexpect
import pytest

from openchatkit.inference import bot
from openchatkit.inference.shell import MAX_LINE
from openchatkit.paths import ROOT

BOT = ROOT / "inference" / "bot.py"
COMMANDS = "/help, /hyperparameters, /passage, /quit, /raw_prompt, /raw_say, /reset, /say"


# -- a pipe


def test_a_pipe_gets_replies_and_nothing_else(pipe, trained_model):
    script = "hello\n  hello  \n\n/reset\n/passage red\nsay it\n/reset\n/say lines\n/quit\nnever said\n"
    done = pipe(script.encode(), trained_model, "--no-sample", "--no-date")
    assert done.stdout.decode() == "first\nagain\n日本 red\ntwo\nlines\n"
    assert (done.stderr, done.status) == (b"", 0)


def test_independent_questions_in_one_run_have_the_answers_of_runs_of_their_own(piped, trained_model):
    questions = ["/passage red\nsay it", "hello", "/passage blue\nsay it"]
    done = piped("\n/reset\n".join(questions), trained_model, "--no-sample", "--no-date")
    assert done.lines == ["日本 red", "first", "日本 blue"]
    assert done.stderr == b""


def test_no_input_is_no_output(piped, trained_model):
    done = piped("", trained_model)
    assert (done.stdout, done.stderr, done.status) == (b"", b"", 0)


def test_a_line_that_says_eof_does_not_end_it(piped, trained_model):
    done = piped("EOF\nhello", trained_model, "--no-sample", "--no-date")
    assert len(done.lines) >= 2
    assert done.status == 0


def test_a_passage_is_for_the_next_question_alone(piped, trained_model):
    done = piped("/passage red\nsay it\n/raw_prompt and now?\n", trained_model, "--no-sample", "--no-date")
    assert done.stdout.decode() == ("日本 red\n<human>: say it\n<bot>: 日本 red\n<human>: and now?\n<bot>:\n")


def test_a_reset_forgets_the_passage_that_waits(piped, trained_model):
    done = piped("/passage red\n/reset\nsay it\n", trained_model, "--no-sample", "--no-date")
    assert done.lines == ["日本 nothing"]


def test_a_question_without_a_reply_leaves_an_empty_line_and_status_2(piped, trained_model):
    script = f"hello\n{'word ' * 300}\nhello\n"
    done = piped(script, trained_model, "--no-sample", "--no-date")
    assert done.lines == ["first", "", "again"]
    assert re.fullmatch(
        r"error: this needs \d+ tokens and its reply up to 128 \(--max-tokens\), more than the 192 that this model "
        r"reads at once: say it shorter, or start with a smaller --max-tokens\n",
        done.stderr.decode(),
    )
    assert done.status == 2


def test_a_line_of_a_megabyte_and_one_beyond_the_limit(piped, trained_model):
    script = f"{'x' * 1_000_000}\n{'y' * (3 * MAX_LINE)}\nhello\n"
    done = piped(script, trained_model, "--no-sample", "--no-date")
    assert done.lines == ["", "", "first"]
    first, second = done.notes
    assert first.startswith("error: this needs 1000")
    assert second == f"error: line 2 of the input is too long: expected at most {MAX_LINE} characters"
    assert done.status == 2


def test_bytes_that_are_no_utf8_are_replaced_and_told_of(pipe, trained_model):
    done = pipe(b"hel\xfflo \xe6\x97\n/raw_prompt\n/reset\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.stderr.decode() == "note: line 1 of the input is not all UTF-8; what is not was replaced by \ufffd\n"
    assert "<human>: hel\ufffdlo \ufffd" in done.stdout.decode()
    assert done.lines[-1] == "first"
    assert done.status == 0


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_question(piped, trained_model):
    done = piped(b"\xef\xbb\xbfhello\r\n/raw_prompt\r\n", trained_model, "--no-sample", "--no-date")
    assert done.stdout == b"first\n<human>: hello\n<bot>: first\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nosuch thing", f"unknown command /nosuch: there are {COMMANDS}; /say TEXT says a text with a slash"),
        ("/", f"unknown command /: there are {COMMANDS}; /say TEXT says a text with a slash"),
        ("/__class__", f"unknown command /__class__: there are {COMMANDS}; /say TEXT says a text with a slash"),
        ("/say", "/say needs a text behind it"),
        ("/passage", "/passage needs a text behind it"),
        ("/raw_say  ", "/raw_say needs a text behind it"),
        (f"/raw_say {'word ' * 300}", "this needs "),
    ],
)
def test_a_command_that_cannot_be_obeyed_is_one_line_and_the_shell_lives_on(piped, trained_model, line, message):
    done = piped(f"{line}\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.stderr.decode().startswith(f"error: {message}")
    assert len(done.notes) == 1
    assert done.lines[-1] == "first"
    assert done.status == 2


def test_the_other_commands(piped, trained_model):
    script = "/hyperparameters\n/help\n/?\n/raw_prompt\n/passage red\n/raw_prompt say it\n/raw_say hello\n"
    done = piped(
        script, trained_model, "--seed", "3", "--top-k", "5", "--temperature", "0", "--max-tokens", "9", "--no-date"
    )
    shown = done.stdout.decode()
    assert shown.startswith(
        "Hyperparameters:\n  max_tokens: 9\n  sample: True\n  temperature: 0.0\n  top_k: 5\n  top_p: 1.0\n  min_p: 0.0\n"
        "  repetition_penalty: 1.0\n  seed: 3\n/help "
    )
    assert shown.count("/passage TEXT       give the next question a passage to answer from") == 2
    assert "\n\n<human>: Passages:\n> red\n\nsay it\n<bot>:\n" in shown
    assert done.status == 0


def test_the_date_opens_the_chat_unless_told_not_to(piped, random_models):
    done = piped("/raw_prompt hi\n", random_models["neox"])
    assert re.fullmatch(
        r"Current Date: \d{4}-\d\d-\d\d\nCurrent Time: .+\n\n<human>: hi\n<bot>:\n", done.stdout.decode()
    )
    assert piped("/raw_prompt hi\n", random_models["neox"], "--no-date").stdout == b"<human>: hi\n<bot>:\n"


def test_a_gptj_chats_too_and_a_seed_repeats_it(piped, random_models):
    def run(seed):
        return piped("hello\nand?\n", random_models["gptj"], "--seed", seed, "--max-tokens", "20", "--no-date").stdout

    assert run("5") == run("5")
    assert run("5") != run("6")


def test_forgotten_turns_and_cut_replies_are_noted(piped, random_models):
    done = piped(f"{'hello ' * 50}\n" * 3, random_models["neox"], "--max-tokens", "100", "--seed", "1", "--no-date")
    notes = done.notes
    assert "note: the reply was cut after 100 tokens (--max-tokens)" in notes
    assert "note: the oldest turn was forgotten to make room" in notes
    assert done.status == 0


def test_a_reader_that_leaves_early_is_no_traceback(trained_model):
    command = f"yes hello | {sys.executable} {BOT} --model {trained_model} --no-sample --no-date | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=True)
    assert done.stdout == b"first\n"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "0"], "argument --top-k: expected a whole number of at least 1, got '0'"),
        (["--top-k", "many"], "argument --top-k: expected a whole number of at least 1, got 'many'"),
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
        (["-r", "0"], "argument -r/--cpu-ram: expected GiB above 0, got '0'"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--retrieval"], "--retrieval is not in this version yet: leave it out, and give passages with /passage TEXT"),
        (["--max-tokens", "999"], "--max-tokens 999 leaves no room for a question: expected fewer than the 192 tokens"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line_and_status_2(piped, trained_model, flags, message):
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
    readme = (ROOT / "inference" / "README.md").read_text(encoding="utf-8")
    flags = {flag for action in bot.parser()._actions for flag in action.option_strings} - {"-h", "--help"}
    documented = re.findall(r"^\| (`-.*?) \|", readme, re.MULTILINE)
    assert set(re.findall(r"`(-[\w-]+)`", " ".join(documented))) == flags
    assert re.findall(r"^\| `/(\w+)", readme, re.MULTILINE) != []
    assert sorted(re.findall(r"^\| `/(\w+)", readme, re.MULTILINE)) == sorted(COMMANDS.replace("/", "").split(", "))


def test_the_readmes_pipe_runs(trained_model):
    readme = (ROOT / "inference" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^printf .*?```", readme, re.MULTILINE | re.DOTALL)[0].rstrip("`")
    command = command.replace("huggingface_models/NAME", str(trained_model)).replace("python ", f"{sys.executable} ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, timeout=120, check=True)
    assert len(done.stdout.splitlines()) >= 2


# -- a terminal


@pytest.fixture
def terminal():
    started = []

    def start(model, *flags: str) -> pexpect.spawn:
        shell = pexpect.spawn(
            sys.executable,
            [str(BOT), "--model", str(model), *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "INPUTRC": "/dev/null"},
            encoding="utf-8",
            dimensions=(40, 200),
            timeout=60,
        )
        started.append(shell)
        return shell

    yield start
    for shell in started:
        shell.close(force=True)


def test_a_terminal_gets_a_welcome_a_prompt_and_replies(terminal, trained_model):
    shell = terminal(trained_model, "--no-sample", "--no-date")
    shell.expect(r"loading \S+ on \S+ in float32\r\n")
    shell.expect_exact("Welcome to OpenChatKit shell.   Type /help or /? to list commands.\r\n")
    shell.expect_exact(">>> ")
    shell.sendline("hello")
    shell.expect_exact("first\r\n>>> ")
    shell.sendline("/passage red")
    shell.expect_exact(">>> ")
    shell.sendline("/reset")
    shell.expect_exact(">>> ")
    shell.sendline("lines")
    shell.expect_exact("two\r\nlines\r\n>>> ")
    shell.sendline("/nosuch")
    shell.expect_exact(f"error: unknown command /nosuch: there are {COMMANDS}")
    shell.expect_exact(">>> ")
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0


def test_quit_leaves(terminal, trained_model):
    shell = terminal(trained_model, "--no-stream")
    shell.expect_exact(">>> ")
    shell.sendline("/quit")
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0


def test_ctrl_c_ends_the_reply_and_not_the_program(terminal, endless_model):
    shell = terminal(endless_model, "--no-date", "--max-tokens", "100000")
    shell.expect_exact(">>> ")
    shell.sendline("go on")
    shell.expect("la la la la la la")
    shell.sendintr()
    shell.expect_exact(">>> ")
    shell.sendline("/raw_prompt")
    shell.expect(r"<human>: go on\r\n<bot>: (la ?){6,}")
    shell.expect_exact(">>> ")
    shell.sendintr()
    shell.expect_exact("note: Ctrl-D or /quit leaves")
    shell.expect_exact(">>> ")
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 0


def test_ctrl_c_ends_a_piped_run(endless_model):
    shell = subprocess.Popen(
        [sys.executable, BOT, "--model", endless_model, "--max-tokens", "100000", "--no-date"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # The first reply proves that the program is up; the second would not end within the test.
    shell.stdin.write(b"/raw_prompt\ngo on\n")
    shell.stdin.flush()
    shell.stdout.readline()
    shell.send_signal(2)
    out, err = shell.communicate(timeout=60)
    assert (out, err, shell.returncode) == (b"", b"interrupted\n", 130)
