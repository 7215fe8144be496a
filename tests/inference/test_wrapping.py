"""Wrapping (wrapping.py), typing during a reply (terminal.py), and the user's editor (editing.py)."""

import contextlib
import os
import pty
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openchatkit.errors import UserError
from openchatkit.inference.shell.editing import edit_text
from openchatkit.inference.shell.terminal import columns_of, no_echo
from openchatkit.inference.shell.wrapping import LineWrapper


def wrapped(text: str, columns: int | None = 20, size: int = 1) -> str:
    wrapper = LineWrapper(columns)
    return "".join([wrapper.push(text[at : at + size]) for at in range(0, len(text), size)]) + wrapper.flush()


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It goes on and on and says no more.", "It goes on and on\nand says no more."),
        ("twenty letters these.", "twenty letters\nthese."),
        ("exactly twenty here. so", "exactly twenty here.\nso"),
        ("two\n\n  lines stay where they are", "two\n\n  lines stay where\nthey are"),
        ("a https://example.org/a/b/c/d/e/f/g end of it", "a\nhttps://example.org/a/b/c/d/e/f/g end of\nit"),
        (
            "```\nfor each in everything: print(each)  \n```\nand then it goes on so",
            "```\nfor each in everything: print(each)  \n```\nand then it goes on\nso",
        ),
        (
            "\u65e5\u672c\u8a9e\u306f\u5358\u8a9e\u306b\u5206\u3051\u306a\u3044",
            "\u65e5\u672c\u8a9e\u306f\u5358\u8a9e\u306b\u5206\u3051\u306a\n\u3044",
        ),
    ],
)
def test_lines_break_between_words_however_the_text_comes(text, expected, size):
    assert wrapped(text, size=size) == expected


@given(st.text("ab \n\t\u65e5\u0301-", max_size=80), st.integers(2, 30), st.integers(1, 9))
def test_only_white_space_changes_and_pieces_do_not_matter(text, columns, size):
    assert wrapped(text, columns, size) == wrapped(text, columns, 1000)
    assert "".join(wrapped(text, columns).split()) == "".join(text.split())
    assert wrapped(text, None, size) == text


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=30))
def test_plain_words_break_as_textwrap_breaks_them(words):
    assert wrapped(" ".join(words)) == textwrap.fill(" ".join(words), 20)


def test_typing_is_not_echoed_during_a_reply_and_is_afterwards():
    import termios

    outer, inner = pty.openpty()
    with os.fdopen(inner, "r") as stream, os.fdopen(outer, "rb"):
        with contextlib.suppress(KeyboardInterrupt), no_echo(stream):
            assert not termios.tcgetattr(inner)[3] & termios.ECHO
            raise KeyboardInterrupt
        assert termios.tcgetattr(inner)[3] & termios.ECHO
        termios.tcsetwinsize(inner, (24, 57))
        assert columns_of(stream) == 57
    with open(os.devnull) as stream:
        with no_echo(stream), no_echo(None):
            pass
        assert columns_of(stream) is None


def test_a_text_is_written_in_the_editor_that_the_environment_names(monkeypatch, tmp_path):
    editor = tmp_path / "an editor"
    editor.write_text('#!/bin/sh\necho "so $1" >> "$2"\n')
    editor.chmod(0o755)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"'{editor}' 'and so'")
    assert edit_text("begun\n") == "begun\nso and so\n"
    monkeypatch.setenv("VISUAL", "false")
    with pytest.raises(UserError, match="the editor false ended with status 1: nothing was asked"):
        edit_text("")
    monkeypatch.setenv("VISUAL", "/nowhere/editor")
    with pytest.raises(UserError, match="the editor /nowhere/editor cannot be run: No such file or directory; EDITOR"):
        edit_text("")
    for name in ("VISUAL", "EDITOR"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no editor is known: set EDITOR"):
        edit_text("")
