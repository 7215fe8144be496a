"""Locks with one holder at a time, folders that are whole or as they were, room, and what a disk refuses."""

import errno
import os
import re
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
from loguru import logger

from openchatkit.errors import UserError
from openchatkit.storage import (
    check_room,
    hold_lock,
    lock_path,
    own_folder,
    storage_errors,
    try_lock,
    whole_folder,
    write_text,
)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = lock_path(tmp_path / "file")
    holders, most, said = 0, 0, []
    logger.add(said.append)

    def work() -> None:
        nonlocal holders, most
        for _ in range(20):
            with hold_lock(lock, "waiting"):
                holders += 1
                most = max(most, holders)
                time.sleep(0.001)
                holders -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == 1
    assert any("waiting" in text for text in said)
    assert list(tmp_path.iterdir()) == []


def fail_holding(lock: Path) -> None:
    with hold_lock(lock, "waiting"):
        assert try_lock(lock) is None
        raise ZeroDivisionError


def test_a_failure_frees_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail_holding(tmp_path / "deep" / ".lock")
    assert list((tmp_path / "deep").iterdir()) == []


def test_files_have_the_mode_of_the_umask_which_never_changes(tmp_path: Path) -> None:
    """Not for a moment: it is one for all threads, and others write files at the same time."""
    called: list[object] = []
    umask = os.umask(0o027)
    sys.setprofile(lambda frame, event, arg: called.append(arg) if event == "c_call" else None)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        sys.setprofile(None)
        os.umask(umask)
    assert os.replace in called
    assert os.umask not in called
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o640]


def test_a_new_folder(tmp_path):
    with whole_folder(tmp_path / "a" / "new") as folder:
        assert folder.parent == tmp_path / "a"
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "new").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert (tmp_path / "a" / "new" / "x").read_text() == "1"


def test_a_folder_is_replaced(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("")
    with whole_folder(tmp_path / "f") as folder:
        (folder / "new").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "new"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("")

    def interrupted():
        with whole_folder(tmp_path / "f") as folder:
            (folder / "new").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "old"]


def test_what_a_kill_left_is_removed(tmp_path):
    for left in (".f.tmp", ".f.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("")
    with whole_folder(tmp_path / "f") as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["f"]


def test_one_writer_at_a_time(tmp_path):
    message = f"another process is writing {tmp_path}/.f.tmp: wait for it, or end it and run again"
    with whole_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("")
        with pytest.raises(UserError, match=re.escape(message)), whole_folder(tmp_path / "f"):
            pytest.fail("two writers")
        assert (folder / "x").exists()
    assert (tmp_path / "f" / "x").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="part of the path is a file"), own_folder(tmp_path / "file" / "x"):
        pytest.fail("made")


def test_room(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free // 2, "a model")
    with pytest.raises(UserError, match=r"a model: .* GB are needed and .* has room for .* GB: use another disk"):
        check_room(tmp_path, free * 2, "a model", "use another disk")


def test_only_what_a_disk_refuses_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")
    message = rf"run the same command again \(the error is about {tmp_path}/x\)$"
    with pytest.raises(UserError, match=message), storage_errors("tokens", every=True):
        (tmp_path / "x").read_bytes()
    with pytest.raises(UserError, match=r"run the same command again$"), storage_errors(tmp_path / "x", every=True):
        (tmp_path / "x").read_bytes()
    message = rf"^cannot write {tmp_path}: gone: choose another path, then run the same command again: it resumes$"
    with pytest.raises(UserError, match=message), storage_errors(tmp_path, "it resumes", every=True):
        raise FileNotFoundError(errno.ENOENT, "gone")
