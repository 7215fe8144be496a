"""The record and the progress of a cached store, and errors where they are damaged."""

from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.formats import cached_store
from openchatkit.formats.cached_store import StoreRecord
from openchatkit.formats.store_writer import StoreProgress


def test_record(tmp_path: Path) -> None:
    assert cached_store.read_record(tmp_path) is None
    record = StoreRecord(source="a.jsonl", key="k", rows=3, documents=1, quarantined=2, tokens=2, trained_tokens=0)
    cached_store.write_record(tmp_path, record)
    assert cached_store.read_record(tmp_path) == record
    for text in ("{", "[]", '{"source": "a"}'):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(UserError, match=r"store\.json is damaged .* delete"):
            cached_store.read_record(tmp_path)


def test_a_record_that_loses_rows_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        cached_store.write_record(tmp_path, StoreRecord("a.jsonl", "k", 4, 1, 2, 2, 0))


def test_progress(tmp_path: Path) -> None:
    assert cached_store.read_progress(tmp_path) is None
    cached_store.write_progress(tmp_path, StoreProgress(rows=3, row=5))
    assert cached_store.read_progress(tmp_path) == StoreProgress(rows=3, row=5)
    (tmp_path / "progress.json").write_text("{")
    assert cached_store.read_progress(tmp_path) is None
    cached_store.remove_progress(tmp_path)
    assert list(tmp_path.iterdir()) == []
