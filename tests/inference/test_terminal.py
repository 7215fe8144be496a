"""The real command on a pseudo-terminal: what a person sees, and the keys."""

import os
import re
import sys
from pathlib import Path

import pexpect
import pytest

from openchatkit.paths import ROOT

BOT = ROOT / "inference" / "bot.py"
LEAVING = "note: Ctrl-D or /quit leaves, and so does Ctrl-C pressed again"
PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture
def terminal(quick_python):
    """Start the command on a terminal."""
    yield from starting(quick_python)


@pytest.fixture
def new_terminal():
    """Start the command on a terminal from scratch, where how it starts is the subject."""
    yield from starting(sys.executable)


def starting(python):
    started = []

    def start(model, *flags: str, **environment: str) -> pexpect.spawn:
        shell = pexpect.spawn(
            str(python),
            [str(BOT), "--model", str(model), *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "INPUTRC": "/dev/null", **environment},
            encoding="utf-8",
            dimensions=(40, 200),
            timeout=60,
        )
        started.append(shell)
        return shell

    yield start
    for shell in started:
        shell.close(force=True)


def ended(shell: pexpect.spawn) -> int | None:
    """The exit status, once the rest of the output is read."""
    shell.expect(pexpect.EOF)
    shell.wait()
    return shell.exitstatus


def test_a_terminal_gets_a_welcome_a_prompt_and_replies(terminal, trained_model):
    shell = terminal(trained_model, "--no-sample", "--no-date")
    shell.expect(r"loading \S+, [\d,]+ parameters, on \S+ in float32\r\n")
    shell.expect(r"trained_model\d+, reads 192 tokens at once, in the kit's form\r\n")
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
    shell.expect_exact("error: unknown command /nosuch: /help lists the commands")
    shell.expect_exact(">>> ")
    shell.sendline("/save kept")
    shell.expect(r"saved as \S+/chats/kept.json\r\n>>> ")
    shell.sendline("/undo")
    shell.expect_exact("taken back: lines\r\n>>> ")
    shell.sendline("/load kept")
    shell.expect_exact("kept: 2 turns; the last question: lines\r\n>>> ")
    shell.sendline("/set top_k 3")
    shell.expect_exact("top_k is now 3\r\n>>> ")
    shell.sendeof()
    # An error that a person has seen is no failure of the whole.
    assert ended(shell) == 0


def test_errors_and_notes_name_what_can_be_done_at_the_prompt(terminal, trained_model):
    shell = terminal(trained_model, "--no-sample", "--no-date")
    shell.expect_exact(">>> ")
    shell.sendline("on " * 200)
    shell.expect(r"error: this needs \d+ tokens and leaves none of the 192 .* say it shorter\r\n>>> ")
    shell.sendline("hello")
    shell.expect_exact("first\r\n>>> ")
    shell.sendline("/set max_tokens 1")
    shell.expect_exact(">>> ")
    shell.sendline("lines")
    shell.expect_exact("note: the reply was cut after 1 token (/set max_tokens)\r\n>>> ")


def test_a_passage_waits_for_a_question_that_gets_a_reply(terminal, trained_model):
    shell = terminal(trained_model, "--no-sample", "--no-date", "--max-tokens", "40")
    shell.expect_exact(">>> ")
    shell.sendline("/passage red")
    shell.expect_exact(">>> ")
    shell.sendline("word " * 100)
    shell.expect(r"the passages are kept for the next question; /passage - takes them back\r\n")
    shell.expect(r"error: this needs \d+ tokens .*\r\n>>> ")
    shell.sendline("say it")
    shell.expect_exact("日本 red\r\n>>> ")
    shell.sendline("/reset")
    shell.expect_exact(">>> ")
    shell.sendline("say it")
    shell.expect_exact("日本 nothing\r\n>>> ")


def test_quit_leaves(terminal, trained_model):
    shell = terminal(trained_model, "--no-stream")
    shell.expect_exact(">>> ")
    shell.sendline("/quit")
    assert ended(shell) == 0


# -- Ctrl-C


def test_ctrl_c_ends_the_reply_and_not_the_program(terminal, endless_model):
    shell = terminal(endless_model, "--no-date", "--max-tokens", "100000")
    shell.expect_exact(">>> ")
    shell.sendline("go on")
    shell.expect("la la la la la la")
    shell.sendintr()
    shell.expect_exact("note: interrupted: the text so far is kept, /undo takes it back\r\n>>> ")
    shell.sendline("/raw_prompt")
    shell.expect(r"<human>: go on\r\n<bot>: (la ?){6,}")
    shell.expect_exact(">>> ")
    shell.send("half a line")
    shell.expect_exact("half a line")
    shell.sendintr()
    shell.expect_exact(f"{LEAVING}\r\n>>> ")
    shell.sendline("/raw_prompt")
    shell.expect_exact("<human>: go on")
    shell.expect_exact(">>> ")
    shell.sendeof()
    assert ended(shell) == 0


def test_typing_during_a_reply_is_hidden_and_waits(terminal, endless_model):
    shell = terminal(endless_model, "--no-date", "--max-tokens", "3000")
    shell.expect_exact(">>> ")
    shell.sendline("go on")
    shell.expect("la la la")
    shell.send("/show\n")
    shell.expect("(la ?[\r\n]*){400}")
    assert "show" not in shell.match[0] + shell.before
    # No word is broken at the edge of the 200 columns.
    assert not [line for line in shell.match[0].splitlines()[1:-1] if set(line.split()) != {"la"} or len(line) > 200]
    shell.expect_exact("note: the reply was cut after 3,000 tokens")
    shell.expect_exact("template: the kit's form")


def test_ctrl_c_twice_at_the_prompt_leaves_with_130(terminal, trained_model):
    shell = terminal(trained_model)
    shell.expect_exact(">>> ")
    shell.sendintr()
    shell.expect_exact(f"{LEAVING}\r\n>>> ")
    shell.sendintr()
    assert ended(shell) == 130
    assert shell.before.endswith("\r\ninterrupted\r\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process has loaded is in /proc on Linux")
def test_ctrl_c_while_the_model_is_loaded_leaves_without_a_traceback(new_terminal, trained_model):
    shell = new_terminal(trained_model)
    # The first of torch's libraries is there: the command has begun, and imports for another second or two.
    mapped = Path(f"/proc/{shell.pid}/maps")
    while "libtorch" not in mapped.read_text():
        assert shell.isalive()
    shell.sendintr()
    status = ended(shell)
    assert (status, shell.signalstatus) in ((130, None), (None, 2))
    assert "Traceback" not in shell.before


def test_ctrl_c_as_the_model_is_announced_leaves_with_130(terminal, trained_model):
    shell = terminal(trained_model)
    shell.expect_exact("loading ")
    shell.sendintr()
    assert ended(shell) == 130
    assert "Traceback" not in shell.before
    assert "interrupted" in shell.before


# -- several lines


def test_blocks_and_continued_lines_are_one_question(terminal, trained_model):
    shell = terminal(trained_model, "--no-date")
    shell.expect_exact(">>> ")
    shell.sendline('/system """Be')
    shell.expect_exact("... ")
    shell.sendline('  kind."""')
    shell.expect_exact(">>> ")
    shell.sendline("/raw_prompt one\\")
    shell.expect_exact("... ")
    shell.sendline("two \\\\")
    shell.expect_exact("Be\r\n  kind.\r\n\r\n<human>: one\r\ntwo \\\\\r\n<bot>:\r\n>>> ")
    shell.sendline('"""')
    shell.expect_exact("... ")
    shell.sendline("/quit")
    shell.expect_exact("... ")
    shell.sendline("")
    shell.expect_exact("... ")
    shell.sendline('said """ ')
    shell.expect_exact(">>> ")
    shell.sendline("/raw_prompt")
    shell.expect_exact("<human>: /quit\r\n\r\nsaid\r\n<bot>:")
    shell.expect_exact(">>> ")
    shell.sendline('"""never said')
    shell.expect_exact("... ")
    shell.sendintr()
    shell.expect_exact(f"{LEAVING}\r\n>>> ")
    shell.sendline('/raw_prompt """a"""')
    shell.expect_exact("said\r\n<bot>:")
    shell.expect_exact("<human>: a\r\n<bot>:\r\n>>> ")
    shell.sendeof()
    assert ended(shell) == 0


def test_a_paste_of_several_lines_is_one_question(terminal, trained_model):
    shell = terminal(trained_model, "--no-date", TERM="xterm", NO_COLOR="1")
    shell.expect_exact(">>> ")
    shell.send("/raw_prompt " + PASTE.format("one\rtwo\nthree"))
    shell.sendline("")
    shell.expect_exact("<human>: one\r\ntwo\r\nthree\r\n<bot>:\r\n")


# -- completion and history


def test_tab_completes_commands_settings_and_saved_chats(terminal, trained_model, chat_home):
    (chat_home / "chats").mkdir(parents=True)
    (chat_home / "chats" / "groceries.json").touch()
    shell = terminal(trained_model, "--no-date")
    shell.expect_exact(">>> ")
    shell.send("/hyp\t")
    shell.expect_exact("/hyperparameters ")
    shell.sendline("")
    shell.expect_exact("Hyperparameters:")
    shell.expect_exact(">>> ")
    shell.send("/set rep\t1.5\r")
    shell.expect_exact("repetition_penalty is now 1.5")
    shell.expect_exact(">>> ")
    shell.send("/load gro\t\r")
    shell.expect(r"error: \S+groceries.json is not a chat that this program saved")
    shell.expect_exact(">>> ")
    shell.send("/re\t\t")
    shell.expect(r"/regen +/reset +/retrieval")
    shell.sendintr()
    shell.expect_exact(">>> ")


def test_the_history_comes_back_in_a_second_run(terminal, trained_model, chat_home):
    shell = terminal(trained_model, "--no-date")
    shell.expect_exact(">>> ")
    shell.sendline("/raw_prompt earlier\\")
    shell.expect_exact("... ")
    shell.sendline("still")
    shell.expect_exact("<human>: earlier\r\nstill\r\n<bot>:\r\n>>> ")
    shell.sendline("/quit")
    assert ended(shell) == 0
    assert (chat_home / "history").read_text() == "/raw_prompt earlier\\nstill\n/quit\n"
    shell = terminal(trained_model, "--no-date")
    shell.expect_exact(">>> ")
    shell.send("\x1b[A\x1b[A\r")
    shell.expect_exact("<human>: earlier\r\nstill\r\n<bot>:\r\n>>> ")


def test_a_history_that_cannot_be_kept_is_one_note(terminal, trained_model, chat_home):
    (chat_home / "history").mkdir(parents=True)
    shell = terminal(trained_model, "--no-date")
    shell.expect(r"note: what is typed is not kept for later: \S+/history: \S.*\r\n>>> ")
    shell.sendline("/raw_prompt hi")
    shell.expect_exact("/raw_prompt hi\r\n<human>: hi\r\n<bot>:\r\n>>> ")


def test_an_unwritable_home_folder_is_reported_before_a_model_is_loaded(terminal, trained_model, chat_home):
    chat_home.write_text("a file where the folder should be")
    shell = terminal(trained_model, "--no-date")
    shell.expect(
        r"note: chats cannot be saved, and what is typed is not kept for later: \S+/chat_home is not a folder; "
        r"OPENCHATKIT_HOME names another folder\r\n"
    )
    assert "loading" not in shell.before
    shell.expect(">>> ")
    assert "note:" not in shell.before
    shell.sendline("/raw_prompt hi")
    shell.expect_exact("/raw_prompt hi\r\n<human>: hi\r\n<bot>:\r\n>>> ")


def test_it_works_without_readline(new_terminal, trained_model, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "readline.py").write_text("raise ImportError")
    shell = new_terminal(trained_model, "--no-date", PYTHONPATH=str(tmp_path / "none"), TERM="xterm")
    shell.expect_exact(">>> ")
    shell.sendline("/raw_prompt one\\")
    shell.expect_exact("... ")
    shell.sendline("two")
    shell.expect_exact("<human>: one\r\ntwo\r\n<bot>:\r\n>>> ")
    shell.sendintr()
    shell.expect_exact(">>> ")
    shell.sendintr()
    assert ended(shell) == 130


# -- colours


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_want_them(terminal, trained_model, environment, coloured):
    shell = terminal(trained_model, "--no-sample", "--no-date", "--verbose", **environment)
    shell.expect_exact(">>> ")
    shell.sendline("/nosuch")
    shell.expect("error:.*\r\n.*>>> ")
    failed = shell.after
    shell.sendline("hello")
    shell.expect("first\r\n")
    shell.expect(r"\d+ tokens, .*\r\n.*>>> ")
    told = shell.before + shell.after
    for shown, mark in ((failed, "\x1b[0m unknown"), (told, "\x1b[2m")):
        assert (mark in shown) is coloured
    # Bracketed paste is no colour, and is turned on and off in any terminal that is not dumb.
    marks = re.findall(r"\x1b\[[\d;]*m", failed + told)
    assert bool(marks) is coloured
