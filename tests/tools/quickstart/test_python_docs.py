"""Reading a library's docstrings, on a small one written here and on the real one."""

import shutil
from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.tools.quickstart.python_docs import DocEntry, first_sentence, read_library, standard_library

MODULE = '''"""Tools for boxes of all kinds.  There is more to say."""

raise SystemExit("a source that is imported instead of parsed ends the test")

def open_box(name):
    """Open the box and
    return what is in it.

    A second paragraph.
    """
    def helper():
        """Nobody can call this from outside."""

async def wait(box):
    """Wait until the box has arrived."""

def _private():
    """Nobody is told about this one."""

def undocumented():
    pass

class Box:
    """A box with a lid."""

    def close(self):
        """Close the lid of the box."""

    class Lid:
        """What closes a box."""

        def turn(self):
            """Turn the lid around once."""

class _Hidden:
    """Not for the public at all."""

    def method(self):
        """Not for the public either."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "boxes.py": MODULE,
        "kit/__init__.py": '"""A package of useful things."""',
        "kit/parts.py": '"""The parts of the package."""',
        "kit/_inner.py": '"""This module is private, really."""',
        "test/test_boxes.py": '"""Tests are not what one asks about."""',
        "site-packages/other.py": '"""Somebody else\'s package, installed."""',
        "broken.py": "def (:",
        "latin.py": b"x = '\xe9'",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_finds_what_is_public_by_its_qualified_name(library):
    assert read_library(library) == [
        DocEntry("boxes", "Tools for boxes of all kinds."),
        DocEntry("boxes.Box", "A box with a lid."),
        DocEntry("boxes.Box.Lid", "What closes a box."),
        DocEntry("boxes.Box.Lid.turn", "Turn the lid around once."),
        DocEntry("boxes.Box.close", "Close the lid of the box."),
        DocEntry("boxes.open_box", "Open the box and return what is in it."),
        DocEntry("boxes.wait", "Wait until the box has arrived."),
        DocEntry("kit", "A package of useful things."),
        DocEntry("kit.parts", "The parts of the package."),
    ]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum.  Then more.", "Return the sum."),
        ("Return the\n    sum of ``a`` and b.", "Return the sum of `a` and b."),
        ("Is it an open file?", "Is it an open file?"),
        ("Use os.path (e.g. its join) here. More.", "Use os.path (e.g. its join) here."),
        ("No end to this one", ""),
        ("Too short.", ""),
        ("Toooooooooooo short.", ""),
        ("Very long" + " and longer" * 12 + ".", ""),
        ("Gibt das Maß zurück.", ""),
        (">>> add(1, 2) gives 3.", ""),
        ("add(a, b) -> the sum of both.", ""),
        ("A bracket (that stays open.", ""),
        ('A quotation " that stays open.', ""),
        ("And so on and so forth...", ""),
        ("A <human>: in a docstring.", ""),
        ("", ""),
    ],
)
def test_a_first_sentence_is_clean_or_left_out(docstring, sentence):
    assert first_sentence(docstring) == sentence


JSON_DUMPS = "json.dumps: Serialize `obj` to a JSON formatted `str`."


def test_a_package_of_the_real_library_is_read(tmp_path):
    for name in ("json", "logging"):
        shutil.copytree(standard_library() / name, tmp_path / name)
    entries = {entry.name: entry for entry in read_library(tmp_path)}
    assert entries["json.dumps"].passage == JSON_DUMPS
    assert any(name.startswith("logging.") for name in entries)
    assert not [entry for entry in entries.values() if "\n" in entry.sentence]


@pytest.mark.long  # it parses all of it
def test_the_real_library_is_read():
    entries = {entry.name: entry for entry in read_library(standard_library())}
    assert len(entries) > 2000
    assert entries["json.dumps"].passage == JSON_DUMPS
    assert not [name for name in entries if name.startswith(("test.", "idlelib"))]
    assert not [entry for entry in entries.values() if "\n" in entry.sentence]


def test_a_folder_without_docstrings_or_none_at_all(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"no docstrings in .*: expected Python sources; pass their folder with --lib"):
        read_library(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*: expected a Python standard library; pass one with --library"):
        read_library(tmp_path / "nowhere")
