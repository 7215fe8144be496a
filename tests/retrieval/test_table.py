"""The table of passages: rows back as they were, neighbours of one document, and files that are not a table."""

import re

import pyarrow as pa
import pytest

from openchatkit.errors import UserError
from openchatkit.retrieval import blocks, table
from openchatkit.retrieval.passage import Passage
from openchatkit.retrieval.table import PassageRow, Table


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    monkeypatch.setattr(blocks, "_OPEN_BLOCKS", 1)


def rows(count):
    return [
        PassageRow(f"text {n}\0é", f"title {n}", "a/b.txt", f"row {n}", bytes([n]), n // 3, n % 3) for n in range(count)
    ]


@pytest.mark.parametrize("count", [1, 4, 11])
def test_rows_come_back_as_they_were(tmp_path, small_blocks, count):
    path = tmp_path / "t"
    assert table.write(path, iter(rows(count))) == count
    with Table(path, count) as opened:
        assert len(opened) == count
        assert [opened.row(n) for n in range(count)] == rows(count)
        assert list(opened.rows()) == rows(count)
        assert list(opened.rows(1, count - 1)) == rows(count)[1 : count - 1]
        assert list(opened.digests()) == [bytes([n]) for n in range(count)]
        assert next(opened.texts()) == "title 0\ntext 0\0é"
        assert opened.passage(0, 0.5) == Passage("text 0\0é", "title 0", "a/b.txt", "row 0", 0.5, 0)


def test_neighbours_are_of_one_document_and_in_range(tmp_path, small_blocks):
    path = tmp_path / "t"
    table.write(path, rows(11))
    with Table(path, 11) as opened:
        assert [list(opened.neighbours(n, 1)) for n in (0, 1, 2, 3, 10)] == [[0, 1], [0, 1, 2], [1, 2], [3, 4], [9, 10]]
        assert list(opened.neighbours(5, 100)) == [3, 4, 5]
        assert list(opened.neighbours(5, 0)) == [5]


def test_other_files_and_numbers_of_rows_are_refused(tmp_path):
    path = tmp_path / "t"
    table.write(path, rows(5))
    with pytest.raises(UserError, match="it holds 5 rows, the manifest says 6"):
        Table(path, 6)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is not a table of passages"):
        Table(path, 5)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int8())])):
        pass
    with pytest.raises(UserError, match="its columns are a"):
        Table(path, 0)
