"""Saved chats: their folder, their names, and files of other programs, which are refused."""

import json
import os
import stat
from pathlib import Path

import pytest

from openchatkit.data.records import document
from openchatkit.errors import UserError
from openchatkit.formats import chat_file

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "日本?\n\tyes", "passages": ["one", "two"]},
    {"role": "assistant", "content": "It is.\n<human>: no"},
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENCHATKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def record(**changes: object) -> bytes:
    right = {
        "format": "openchatkit.chat",
        "version": 1,
        "saved": "",
        "model": "m",
        "messages": MESSAGES,
        "settings": {},
    }
    return json.dumps({**right, **changes}).encode()


def put(data: bytes, name: str = "x") -> Path:
    path = chat_file.chat_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_chat_comes_back_as_it_was_saved(home):
    path = chat_file.write("first", MESSAGES, model="some/model", settings={"top_k": 5, "seed": None})
    assert path == home / "chats" / "first.json"
    assert path.read_bytes().count(b"\n") == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    saved = chat_file.read("first")
    assert (saved.messages, saved.model, saved.settings) == (MESSAGES, "some/model", {"top_k": 5, "seed": None})
    assert saved.saved.endswith("+00:00")


def test_saved_chats_are_training_records(tmp_path):
    paths = [chat_file.write("first", MESSAGES, settings={"text": 1}), chat_file.write("second", MESSAGES[1:])]
    joined = tmp_path / "chats.jsonl"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    turns = "<human>: Passages:\n> one\n> two\n\n日本?\n\tyes\n<bot>: It is.\n(human>: no\n"
    assert list(document.texts(joined)) == [f"Be kind.\n\n{turns}", turns]
    assert [segment.trained for segment in document.decode(paths[0].read_bytes())] == [False, True]


def test_nothing_is_replaced_unless_asked_for():
    chat_file.write("first", MESSAGES, model="one")
    with pytest.raises(UserError, match=r"there is a chat first already: .* replace it with first!"):
        chat_file.write("first", MESSAGES, model="two")
    assert chat_file.read("first").model == "one"
    chat_file.write("first", MESSAGES, model="two", overwrite=True)
    assert chat_file.read("first").model == "two"


def test_the_names_of_saved_chats(home):
    assert chat_file.list_chats() == []
    for name in ("b", "a.1", "-"):
        chat_file.write(name, MESSAGES)
    (home / "chats" / "not a name.json").touch()
    (home / "chats" / ".hidden.json").touch()
    (home / "chats" / "c.txt").touch()
    assert chat_file.list_chats() == ["-", "a.1", "b"]
    with pytest.raises(UserError, match=r"there is no saved chat c: there are -, a\.1, b"):
        chat_file.read("c")


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "../a", "/etc/passwd", ".a", "..", "a b", "a\n", "a\0", "é", "x" * 65, "a\\b", "\x1b[2J", "\udc80"],
)
def test_what_is_no_name_is_refused_in_one_line(name):
    for action in (chat_file.read, lambda name: chat_file.write(name, MESSAGES)):
        with pytest.raises(UserError, match="cannot be the name of a chat: expected at most 64") as refused:
            action(name)
        assert str(refused.value).isascii()
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON, or cut short"),
        (record()[:-5], "not JSON, or cut short"),
        (b"[" * 100_000, "its JSON cannot be read"),
        (b'{"format": ' + b"9" * 5000 + b"}", "its JSON cannot be read"),
        (b"\xff\xfe", "byte 1 is not UTF-8"),
        (b"[]", "its format is not"),
        (b'{"messages": []}', "its format is not"),
        (record(format=["openchatkit.chat"]), "its format is not"),
        (record(version=2), "its version is 2, this program reads 1"),
        (record(version=True), "its version is True"),
        (record(model=1), "of the wrong kind"),
        (record(settings=[]), "of the wrong kind"),
        (record(saved=None), "of the wrong kind"),
        (record(messages={}), "it has no list of messages"),
        (record(messages=[]), "it has no list of messages"),
        (record(messages=["hi"]), "message 1 is not an object"),
        (
            record(messages=[{"role": "tool", "content": ""}]),
            "message 1 has the role 'tool': expected system, user, as",
        ),
        (record(messages=[{"role": ["user"], "content": ""}]), r"message 1 has the role \['user'\]"),
        (record(messages=[{"role": "user", "content": 1}]), "message 1 holds something that is not text"),
        (record(messages=[{"role": "user"}]), "message 1 holds something that is not text"),
        (record(messages=[{"role": "user", "content": "", "passages": "p"}]), "message 1 has passages where none"),
        (record(messages=[{"role": "user", "content": "", "passages": [1]}]), "message 1 holds something that is no"),
        (record(messages=[{"role": "assistant", "content": "", "passages": ["p"]}]), "message 1 has passages where"),
        (record(messages=[{"role": "user", "content": "\x1b]0;"}]), r"message 1 holds the control character U\+001B"),
        (record(messages=[{"role": "user", "content": "\ud800"}]), r"message 1 holds the control character U\+D800"),
        (record(messages=[{"role": "user", "content": "", "passages": ["\0"]}]), r"control character U\+0000"),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(data, message):
    path = put(data)
    with pytest.raises(UserError, match=message) as refused:
        chat_file.read("x")
    assert str(refused.value).startswith(f"{path} is not a chat that this program saved: ")
    assert "\n" not in str(refused.value)


def test_what_is_too_long_is_neither_read_nor_written():
    with pytest.raises(UserError, match="a saved one holds at most 16777216"):
        chat_file.write("x", [{"role": "user", "content": "x" * chat_file.SIZE_LIMIT}])
    put(b" " * (chat_file.SIZE_LIMIT + 1))
    with pytest.raises(UserError, match="it is longer than 16777216 bytes"):
        chat_file.read("x")


def test_no_link_is_followed_and_no_pipe_is_waited_for(tmp_path, home):
    target = tmp_path / "target"
    target.write_bytes(record())
    (home / "chats").mkdir(parents=True)
    (home / "chats" / "x.json").symlink_to(target)
    with pytest.raises(UserError, match=r"x\.json cannot be read: "):
        chat_file.read("x")
    with pytest.raises(UserError, match="there is a chat x already"):
        chat_file.write("x", MESSAGES)
    chat_file.write("x", MESSAGES, overwrite=True)
    assert target.read_bytes() == record()
    os.mkfifo(home / "chats" / "y.json")
    with pytest.raises(UserError, match="it is not a plain file"):
        chat_file.read("y")
    (home / "chats" / "z.json").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        chat_file.read("z")


def test_a_place_that_cannot_be_written_is_one_line(home):
    home.write_text("a file where a folder belongs")
    with pytest.raises(UserError, match=r"the chat cannot be saved as .*x\.json: "):
        chat_file.write("x", MESSAGES)
    assert chat_file.list_chats() == []
    with pytest.raises(UserError, match=r"x\.json cannot be read: "):
        chat_file.read("x")


def test_the_users_home_is_where_chats_are_kept_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENCHATKIT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert chat_file.home() == tmp_path / ".openchatkit"
    assert chat_file.history_path() == tmp_path / ".openchatkit" / "history"


def test_a_home_that_is_not_there_yet_can_be_written_where_its_nearest_folder_can(monkeypatch, tmp_path):
    assert chat_file.unwritable_reason() == ""
    assert not chat_file.home().exists()
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: False)
        assert chat_file.unwritable_reason() == f"{tmp_path} cannot be written"
    (tmp_path / "home").symlink_to(tmp_path / "nowhere")
    assert chat_file.unwritable_reason() == f"{tmp_path / 'home'} is not a folder"


@pytest.mark.parametrize("variable", ["HOME", "OPENCHATKIT_HOME"])
def test_an_error_names_the_variable_of_a_user_without_a_home_folder(monkeypatch, variable):
    monkeypatch.delenv("OPENCHATKIT_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a user that the system knows not
    if variable != "HOME":
        monkeypatch.setenv(variable, "~nosuchuser/chats")
    with pytest.raises(UserError, match="has no home folder: set OPENCHATKIT_HOME to a folder"):
        chat_file.chat_path("a")
