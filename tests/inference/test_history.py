"""The history file of the shell."""

import os
import stat
import threading

import pytest

from openchatkit.inference.shell import history


def test_what_is_appended_is_read_whatever_it_holds(tmp_path):
    path = tmp_path / "home" / "history"
    entries = ["hello", "two\nlines", "a \\n that is none, \\\\ and \\", '"""\nblock\r\n"""', "日本 😀", "\udcff"]
    for entry in entries:
        history.append(path, entry)
    assert history.read(path) == [*entries[:-1], "?"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_file_is_no_history(tmp_path):
    assert history.read(tmp_path / "history") == []


def test_an_entry_that_was_cut_and_one_that_is_too_long_are_left_out(tmp_path):
    path = tmp_path / "history"
    history.append(path, "x" * history.ENTRY_LIMIT)
    assert not path.exists()
    path.write_bytes(b"whole\ncut")
    assert history.read(path) == ["whole"]


def test_zeros_that_a_crash_left_are_not_read(tmp_path):
    path = tmp_path / "history"
    path.write_bytes(b"be\0fore\n" + bytes(5) + b"behind\n")
    assert history.read(path) == ["before", "behind"]


def test_a_file_that_becomes_too_large_keeps_its_newer_half(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "SIZE_LIMIT", 100)
    path = tmp_path / "history"
    for number in range(100):
        history.append(path, f"line {number}")
        assert path.stat().st_size <= 100
    kept = history.read(path)
    assert kept == [f"line {number}" for number in range(100 - len(kept), 100)]
    assert len(kept) >= 5
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_shells_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "history"

    def shell(name):
        for number in range(50):
            history.append(path, f"{name} {number}")

    threads = [threading.Thread(target=shell, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = history.read(path)
    for name in "abcd":
        assert [entry for entry in kept if entry[0] == name] == [f"{name} {number}" for number in range(50)]


def test_a_pipe_or_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=r"regular file|directory"):
            history.read(tmp_path / name)
        with pytest.raises(OSError, match=r"regular file|directory"):
            history.append(tmp_path / name, "hello")
