"""The manifest of a retrieval index, and stale files."""

import json
import re

import pytest

from openchatkit.errors import UserError
from openchatkit.formats import manifest
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.manifest import DamagedError
from openchatkit.formats.retrieval_index import (
    DenseRecord,
    EncoderRecord,
    IndexRecord,
    ScoreThreshold,
    Skipped,
    SourceRecord,
    SparseRecord,
)

RECORD = IndexRecord(
    snapshot=3,
    rows=2,
    sources=1,
    skipped=1,
    encoder=EncoderRecord("e", "d", 8, "cosine", 128, "mean"),
    dense=DenseRecord("IndexScalarQuantizer"),
    sparse=SparseRecord(1.5, 0.75, 4, 5, 2.5),
    score_threshold=ScoreThreshold(0.3, 0.2, 0.6, 0.5),
    chunking={"tokens": 128},
)
SOURCE = SourceRecord("a.txt", "0" * 64, 10, 5, 0, 2)


@pytest.fixture
def folder(tmp_path):
    names = [layout.file_name(role, RECORD.snapshot) for role in layout.roles(RECORD)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    assert layout.write_lines(tmp_path / layout.file_name("sources", 3), [SOURCE]) == 1
    layout.write_lines(tmp_path / layout.file_name("skipped", 3), [Skipped("b.pdf", "encrypted")])
    layout.write(tmp_path, RECORD, [manifest.record(tmp_path / name) for name in names])
    return tmp_path


def altered(folder, **changes):
    """The manifest with other facts, its own digest right."""
    read = manifest.read(folder)
    manifest.write(folder, read.files.values(), about={**read.about, **changes})


def test_a_written_record_is_read_back(folder):
    record, files = layout.read(folder)
    assert {**vars(record), "time_stamps": {}} == vars(RECORD)
    assert set(record.time_stamps) == set(files) == {path.name for path in folder.iterdir()} - {layout.MANIFEST}
    layout.check_files(folder, record, files)
    assert layout.read_sources(folder, record) == [SOURCE]
    assert layout.read_skipped(folder, record) == [Skipped("b.pdf", "encrypted")]


def test_an_index_without_an_encoder_has_no_vector_files():
    roles = layout.roles(IndexRecord(1, 1, 1, 0, None, None, RECORD.sparse, RECORD.score_threshold))
    assert "vectors" not in roles
    assert "dense" not in roles
    assert "words" in roles


def test_sizes_and_time_stamps_are_compared(folder):
    record, files = layout.read(folder)
    path = folder / layout.file_name("table", 3)
    content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{re.escape(str(path))} was written to or copied.*info --verify"):
        layout.check_files(folder, record, files)
    path.write_bytes(content + b"!")
    with pytest.raises(DamagedError, match=r"table-000003\.arrow has \d+ bytes"):
        layout.check_files(folder, record, files)
    path.unlink()
    with pytest.raises(DamagedError, match=r"table-000003\.arrow is missing"):
        layout.check_files(folder, record, files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "another kind of folder"),
        ({"version": 2}, "version 2: this program reads version 3; remove it and build it again"),
        ({"generation": 4}, "should name one file for each part"),
        ({"encoder": None}, "a part of the record is missing"),
        ({"sparse": {"k1": 1}}, "is damaged"),
        ({"unheard": 1}, "is damaged"),
    ],
)
def test_other_facts_are_refused(folder, changes, message):
    altered(folder, **changes)
    with pytest.raises(DamagedError, match=message):
        layout.read(folder)


def test_a_manifest_that_points_out_of_its_folder_is_refused(folder):
    read = manifest.read(folder)
    stamps = {"../elsewhere": 0, **read.about["time_stamps"]}
    files = [manifest.FileRecord("../elsewhere", 1, "0" * 64), *read.files.values()]
    manifest.write(folder, files, about={**read.about, "time_stamps": stamps})
    with pytest.raises(DamagedError, match=r"but for \.\./elsewhere"):
        layout.read(folder)


def test_a_folder_without_a_manifest_is_not_an_index(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest\.json: expected a retrieval index"):
        layout.read(tmp_path)
    with pytest.raises(UserError, match="is not a folder: expected a retrieval index"):
        layout.read(tmp_path / "none")


def test_stale_files_are_only_those_of_an_index_writer(folder):
    left = ["table-000002.arrow", "dense-000004.faiss", "spill-000004.bin", ".manifest.json.x8.tmp"]
    for name in [*left, "notes.txt", "table.arrow", "table-2024.csv"]:
        (folder / name).write_bytes(b"")
    layout.partial_folder(folder).mkdir()
    assert sorted(path.name for path in layout.stale_files(folder)) == sorted(left)
    (folder / layout.MANIFEST).write_text(json.dumps({"digest": 0}))
    assert layout.stale_files(folder) == [], "what a damaged manifest named may still be wanted"


def test_damaged_lines_are_named(folder):
    path = folder / layout.file_name("skipped", 3)
    path.write_text('{"source": "a", "reason": "b"}\n{"source"')
    with pytest.raises(DamagedError, match=r"skipped-000003\.jsonl:2 is damaged"):
        layout.read_skipped(folder, RECORD)


def test_a_missing_list_of_sources_is_named(folder):
    record = layout.read(folder)[0]
    (folder / layout.file_name("sources", 3)).unlink()
    with pytest.raises(DamagedError, match=r"sources.* cannot be read: No such file.*; if the index was being written"):
        layout.read_sources(folder, record)
