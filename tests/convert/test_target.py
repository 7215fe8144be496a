"""The folders that conversions write: whole or as they were, one writer at a time."""

import re
import shutil

import pytest

from openchatkit.convert.target import check_room, locked, whole_folder
from openchatkit.errors import UserError


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
    with pytest.raises(UserError, match="part of the path is a file"), locked(tmp_path / "file" / "x"):
        pytest.fail("made")


def test_room(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path, free // 2)
    with pytest.raises(UserError, match=r"GB are needed, .* GB are free; make room or use another disk"):
        check_room(tmp_path, free * 2)
