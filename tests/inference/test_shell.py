"""The shell's commands: piped into the real command, and in this process for the many small cases."""

import io
import json
import re
import subprocess

import pytest
import torch

from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.responder import Reply
from openchatkit.inference.session import Session
from openchatkit.inference.shell import editing
from openchatkit.inference.shell.commands import Shell
from openchatkit.inference.shell.line_reader import MAX_LINE
from openchatkit.inference.shell.output import Output
from openchatkit.paths import ROOT

BOT = ROOT / "inference" / "bot.py"
COMMANDS = (
    "chats edit help hyperparameters load passage quit raw_prompt raw_say regen reset retrieval save say set show "
    "sources stats system undo"
)
LISTED = "/help lists the commands, /say TEXT asks a question that begins with a slash"


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


def test_passages_that_wait_are_taken_back(piped, trained_model):
    done = piped("/passage red\n/passage blue\n/passage -\nsay it\n", trained_model, "--no-sample", "--no-date")
    assert done.lines == ["日本 nothing"]


def test_in_a_pipe_a_passage_ends_with_its_question_though_that_failed(piped, trained_model):
    script = f"/passage red\n{'word ' * 300}\nsay it\n"
    done = piped(script, trained_model, "--no-sample", "--no-date")
    assert done.lines == ["", "日本 nothing"]


def test_a_question_without_a_reply_leaves_an_empty_line_and_status_2(piped, trained_model):
    script = f"hello\n{'word ' * 300}\nhello\n"
    done = piped(script, trained_model, "--no-sample", "--no-date")
    assert done.lines == ["first", "", "again"]
    assert re.fullmatch(
        r"error: this needs \d+ tokens and leaves none of the 192 that this model reads at once for a reply: "
        r"say it shorter\n",
        done.stderr.decode(),
    )
    assert done.status == 2


def test_a_reply_cut_at_the_end_of_the_context_has_a_note(piped, random_models):
    done = piped("word " * 60 + "\n", random_models["neox"], "--max-tokens", "4000", "--seed", "1", "--no-date")
    assert done.notes == ["note: the reply was cut: it reached the end of what the model reads at once"]
    assert done.status == 0


@pytest.mark.parametrize(
    ("line", "text", "note"),
    [
        ("and?", "It g", "the text so far is kept, /undo takes it back"),
        ("and?", "", "the question was not kept"),
        ("/raw_say It", " g", "the conversation is as it was"),
        ("/raw_say It", "", "the conversation is as it was"),
        ("/regen", "It g", "the text so far replaces the old reply"),
        ("/regen", "", "the old reply stays"),
    ],
)
def test_a_note_says_what_remains_of_an_interrupted_reply(line, text, note):
    class Interrupted:
        """A responder whose replies are interrupted."""

        def answer(self, *_, **__):
            return Reply(text, (), "interrupted")

        complete = answer

    session = Session(Interrupted(), Sampling(), date=False)
    session.conversation = before = Conversation().asked("hello").answered("first")
    stderr = io.StringIO()
    shell = Shell(session, Output(io.StringIO(), stderr, interactive=True), stdin=None, stdout=io.StringIO())
    shell.onecmd(line)
    assert stderr.getvalue() == f"note: interrupted: {note}\n"
    if line.startswith("/raw_say") or not text:
        assert session.conversation == before
    if line == "/regen" and text:
        assert session.conversation == Conversation().asked("hello").answered(text)


def test_a_line_of_a_megabyte_and_one_beyond_the_limit(piped, trained_model):
    script = f"{'x' * 1_000_000}\n{'y' * (3 * MAX_LINE)}\nhello\n"
    done = piped(script, trained_model, "--no-sample", "--no-date")
    assert done.lines == ["", "", "first"]
    first, second = done.notes
    assert first.startswith("error: this needs 1000")
    assert second == f"error: line 2 of the input is too long: expected at most {MAX_LINE} characters"
    assert done.status == 2


def test_bytes_that_are_not_utf8_are_replaced_with_a_note(pipe, trained_model):
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
        ("/nosuch thing", f"unknown command /nosuch: {LISTED}"),
        ("/", f"unknown command /: {LISTED}"),
        ("/__class__", f"unknown command /__class__: {LISTED}"),
        ("/rest", f"unknown command /rest: did you mean /reset? {LISTED}"),
        ("/e\x1b[31mvil", f"unknown command /evil: {LISTED}"),
        ("/say", "/say needs a text after it"),
        ("/passage", "/passage needs a text after it"),
        ("/raw_say  ", "/raw_say needs a text after it"),
        (f"/raw_say {'word ' * 300}", "this needs "),
        ("/set temprature 1", "unknown setting temprature: did you mean temperature? there are max_tokens, sample, "),
        ("/set temperature nan", "temperature nan: expected a number from 0"),
        ("/set top_p -1", "top_p -1.0: expected a number above 0"),
        ("/set top_k many", "top_k 'many': expected a whole number of at least 0"),
        ("/set max_tokens 0", "max_tokens 0: expected a whole number of at least 1"),
        ("/set verbose maybe", "verbose 'maybe': expected on or off"),
        ("/save", "/save needs the name to save under"),
        ("/save a", "there is nothing to save yet: ask something first"),
        ("/load", "/load needs the name of a saved chat; /chats lists them"),
        ("/load nosuch", "there is no saved chat nosuch: there are none yet"),
        ("/load ../secret", "'../secret' cannot be the name of a chat: expected at most 64 letters"),
        ("/undo", "nothing to undo: no question has been asked yet"),
        ("/retrieval on", "there is no index to look in: start with --retrieval PATH, or give passages with /passage"),
        ("/retrieval maybe", "/retrieval 'maybe': expected on or off"),
    ],
)
def test_a_command_that_fails_is_one_line_and_the_shell_goes_on(piped, trained_model, line, message):
    done = piped(f"{line}\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.stderr.decode().startswith(f"error: {message}")
    assert len(done.notes) == 1
    assert done.lines[-1] == "first"
    assert done.status == 2


def test_a_question_to_ask_again_that_is_not_there_leaves_an_empty_line(piped, trained_model):
    done = piped("/regen\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.lines == ["", "first"]
    assert done.notes == ["error: nothing to answer again: no question has been asked yet"]


def test_a_chat_file_that_is_not_ours_is_one_line(piped, trained_model, chat_home):
    (chat_home / "chats").mkdir(parents=True)
    (chat_home / "chats" / "foreign.json").write_text('{"messages": []}')
    done = piped("/load foreign\nhello\n", trained_model, "--no-sample", "--no-date")
    assert re.fullmatch(r"error: \S+foreign.json is not a chat that this program saved: .+", done.notes[0])
    assert (done.lines, done.status) == (["first"], 2)


def test_a_disk_that_refuses_a_chat_is_one_line(piped, trained_model, chat_home):
    chat_home.write_text("a file where the folder should be")
    done = piped("hello\n/save a\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.lines == ["first", "again"]
    assert len(done.notes) == 1
    assert done.notes[0].startswith("error: the chat cannot be saved as ")


def test_out_of_memory_undoes_the_turn_and_the_shell_goes_on(piped, trained_model, monkeypatch):
    forward = torch.nn.Embedding.forward
    prompts = []

    def read(self, ids):
        # Of the first three prompts, the second finds no memory.
        prompts.extend([ids.shape] if ids.numel() > 3 else [])
        if ids.numel() > 3 and len(prompts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", read)
    done = piped("hello\nhello\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.lines == ["first", "", "again"]
    assert done.notes[0].startswith("error: out of memory: this turn was undone")
    assert (len(done.notes), done.status) == (1, 2)


def test_undo_and_regen_take_back_and_repeat(piped, trained_model):
    asked = "hello\nhello\n/undo\nhello\n/regen\n/passage red\nsay it\n/regen\n"
    done = piped(asked + "/undo\n" * 4 + "hello\n", trained_model, "--no-sample", "--no-date", "--max-tokens", "20")
    assert done.lines == ["first", "again", "again", "again", "日本 red", "日本 red", "first"]
    assert done.notes == ["error: nothing to undo: no question has been asked yet"]


def test_the_other_commands(piped, trained_model):
    script = "/hyperparameters\n/help\n/?\n/raw_prompt\n/passage red\n/raw_prompt say it\n/raw_say hello\n"
    done = piped(
        script, trained_model, "--seed", "3", "--top-k", "5", "--temperature", "0", "--max-tokens", "9", "--no-date"
    )
    shown = done.stdout.decode()
    assert shown.startswith(
        "Hyperparameters:\n  max_tokens: 9\n  sample: True\n  temperature: 0.0\n  top_k: 5\n  top_p: 1.0\n"
        "  min_p: 0.0\n  repetition_penalty: 1.0\n  seed: 3\n/chats "
    )
    assert shown.count("/passage TEXT|-      give the next question a passage to answer from") == 2
    assert "\n\n<human>: Passages:\n> red\n\nsay it\n<bot>:\n" in shown
    assert done.status == 0


def test_settings_are_changed_shown_and_used(piped, trained_model):
    script = (
        '/set\n/set top-k 7\n/set top_k\n/set stop ["o"]\n/set sample off\n/set stop\nlines\n/reset\n'
        "/set stop none\nlines\n/reset\n/set max_tokens 1\nlines\n"
    )
    done = piped(script, trained_model, "--no-date", "--seed", "4")
    assert done.stdout.decode().startswith(
        "max_tokens: 128\nsample: on\ntemperature: 0.6\ntop_k: 40\ntop_p: 1.0\nmin_p: 0.0\nrepetition_penalty: 1.0\n"
        'seed: 4\nstop: none\nverbose: off\ntop_k: 7\nstop: ["o"]\ntw\ntwo\nlines\n'
    )
    assert done.notes == ["note: the reply was cut after 1 token (--max-tokens)"]


def test_the_system_text_opens_the_conversation_and_goes(piped, trained_model):
    script = "/system Be  kind.\n/system\n/raw_prompt hi\n/system -\n/raw_prompt hi\n/system\n"
    done = piped(script, trained_model, "--no-date", "--system", "At first.")
    assert done.stdout.decode() == ("Be  kind.\nBe  kind.\n\n<human>: hi\n<bot>:\n<human>: hi\n<bot>:\n\n")
    assert piped("/system", trained_model, "--system", "At first.").stdout == b"At first.\n"


def test_a_chat_is_saved_listed_and_continued(piped, trained_model, chat_home):
    flags = ("--no-sample", "--no-date")
    done = piped("hello\n/save a\n/save a\n/save a!\n/save b\n/chats\n", trained_model, *flags)
    assert done.lines == ["first", "a", "b"]
    assert done.notes == [
        "error: there is a chat a already: save under another name, or replace it with a!",
    ]
    assert sorted(path.name for path in (chat_home / "chats").iterdir()) == ["a.json", "b.json"]
    assert piped("/load a\nhello\n", trained_model, *flags).lines == ["again"]
    assert piped("hello\n", trained_model, *flags, "--load", "b").lines == ["again"]


def test_what_was_said_cannot_reach_the_terminal_as_control_sequences(piped, trained_model):
    script = (
        "/system \x1b]0;title\x07 \x9b31mred\n/system\n/raw_prompt \x1b[2Jgone\n/set nosuch\x1b[31m 1\n/load \x1b[31m\n"
    )
    done = piped(script, trained_model, "--no-date")
    assert re.search(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", done.stdout + done.stderr) is None
    assert len(done.notes) == 2


def test_statistics_are_printed_on_request(piped, trained_model):
    done = piped("/stats\nhello\n/stats\n/set verbose on\nhello\n", trained_model, "--no-sample", "--no-date")
    assert done.lines[:2] == ["no reply yet", "first"]
    last, every = done.lines[2:4]
    figures = (
        r"[\d,]+ tokens, ([\d.]+ tokens/s, )?the first after [\d.]+ s, "
        r"[\d,]+ tokens of prompt, \d+ % of them kept from before"
    )
    assert re.fullmatch(f"last reply: {figures}", last)
    assert re.fullmatch(r"all replies: [\d,]+ tokens in .+; prompts of [\d,]+ tokens, \d+ of them kept .+", every)
    assert done.lines[4:] == ["again"]
    assert len(done.notes) == 1
    assert re.fullmatch(figures, done.notes[0])
    assert piped("hello\n", trained_model, "--verbose", "--no-sample").notes != []


def test_help_lists_every_command(piped, trained_model):
    shown = piped("/help\n/?\n", trained_model).stdout.decode()
    names = re.findall(r"^/(\w+)", shown, re.MULTILINE)
    assert sorted(set(names)) == names[: len(names) // 2] == COMMANDS.split()


def test_what_people_type_in_other_shells_does_what_it_does_there(piped, trained_model):
    for leaving in ("/bye", "/exit"):
        done = piped(f"hello\n/clear\nhello\n{leaving}\nhello\n", trained_model, "--no-sample", "--no-date")
        assert (done.lines, done.status) == (["first", "first"], 0)
    # From a pipe, a line without a slash is a question.
    assert len(piped("quit\nhelp\n", trained_model, "--no-sample").lines) == 2


@pytest.mark.parametrize("line", ["exit", "Quit"])
def test_on_a_terminal_the_words_that_leave_need_no_slash(line):
    output = Output(stdout := io.StringIO(), io.StringIO(), interactive=True)
    shell = Shell(Session(None, Sampling(), date=False), output, stdin=None, stdout=stdout)
    assert shell.onecmd(line) is True
    assert shell.onecmd("help") is False
    assert stdout.getvalue().startswith("/chats")


def test_a_question_may_begin_with_a_path(piped, trained_model, tmp_path):
    lines = f"{tmp_path}/x.py what is it?\n/no/such/file\n/tmp holds what?\n"
    done = piped(lines, trained_model, "--no-sample", "--no-date", "--json")
    asked = [json.loads(line)["question"] for line in done.lines]
    assert (asked, done.status) == (lines.splitlines(), 0)


def test_show_says_what_is_in_use(piped, trained_model):
    done = piped("hello\n/system Be kind.\n/show\n", trained_model, "--no-sample", "--no-date", "--seed", "7")
    assert re.match(r"model: \S+, reads 192 tokens at once, in the kit's form$", done.lines[1])
    assert done.lines[2:6] == [
        "template: the kit's form",
        "system: Be kind.",
        "conversation: 2 turns",
        "retrieval: off",
    ]
    assert {"temperature: 0.6", "sample: off", "seed: 7", "verbose: off"} <= set(done.lines)


def test_an_editor_is_for_a_terminal(piped, trained_model, monkeypatch):
    assert piped("/edit\n", trained_model).notes == ["error: /edit needs a terminal: give the text with /say TEXT"]
    asked = []

    class Silent:
        def answer(self, conversation, *_, **__):
            asked.append(conversation.turns[-1].text)
            return Reply("yes", (), "end")

    monkeypatch.setattr(editing, "edit_text", lambda text: f"{text}\nmore\n")
    output = Output(io.StringIO(), io.StringIO(), interactive=True)
    shell = Shell(Session(Silent(), Sampling(), date=False), output, stdin=None, stdout=io.StringIO())
    shell.onecmd("/edit begun")
    monkeypatch.setattr(editing, "edit_text", lambda text: " \n")
    shell.onecmd("/edit")
    assert asked == ["begun\n\nmore"]


def test_the_date_opens_the_chat_unless_turned_off(piped, random_models):
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
    assert "note: the oldest turn was left out to make room" in notes
    assert done.status == 0


def test_a_reader_that_leaves_early_is_no_traceback(trained_model, quick_python):
    command = f"yes hello | {quick_python} {BOT} --model {trained_model} --no-sample --no-date | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=True)
    assert done.stdout == b"first\n"
    assert b"Traceback" not in done.stderr
