"""`building`: which files are read again, which are excluded, and what remains after a kill."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import WORDS, make_encoder

from openchatkit import storage
from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.retrieval import ranking
from openchatkit.retrieval.building import assembly, operations, plan, vector_cache
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.index import Index
from openchatkit.retrieval.reading import reader
from openchatkit.retrieval.table import PassageRow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("encoders") / "tiny"))


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # No stamp becomes reliable while a slow test runs, which would be a change of the record.
    monkeypatch.setattr(storage, "SETTLED_SECONDS", 3600.0)
    folder = tmp_path / "docs"
    write(folder / "kitchen.md", "# Kitchen\n\nbread in the hot oven\n\n## Table\n\nspoon and cup\n")
    write(folder / "sea.txt", "the ship and the sail\n\n" + "fish wave salt water " * 15)
    write(
        folder / "more" / "rows.jsonl", '{"text": "old castle wall", "url": "http://a/castle"}\n{"text": "red fox"}\n'
    )
    write(folder / "broken.pdf", b"%PDF-1.4")
    return folder


@pytest.fixture
def embeddings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that were embedded, questions aside."""
    seen: list[str] = []
    encode = Encoder.encode

    def counted(self: Encoder, texts: list[str], **options: object) -> np.ndarray:
        seen.extend([] if options.get("query") else texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    return seen


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows_of(folder: Path) -> list[PassageRow]:
    with Index.open(folder) as index:
        return list(index.table.rows())


def files_of(folder: Path) -> dict[str, int]:
    """Passages by file."""
    record = layout.read(folder)[0]
    return {Path(each.source).name: each.rows for each in layout.read_sources(folder, record)}


def check(folder: Path, encoder: str) -> None:
    """Each passage has the vector that the encoder makes of it, and each source its rows."""
    with Index.open(folder) as index:
        rows = list(index.table.rows())
        for row, vector in zip(rows, index.vectors, strict=True):
            text = f"{row.title}\n{row.text}" if row.title else row.text
            np.testing.assert_allclose(vector, Encoder(encoder).encode([text])[0], atol=2e-3)
            assert row.digest == vector_cache.text_digest(text)
        for source in layout.read_sources(folder, index.record):
            own = rows[source.first : source.first + source.rows]
            assert {row.source for row in own} <= {source.source, "http://a/castle"}
    assert not layout.stale_files(folder)
    assert not layout.partial_folder(folder).exists()


def test_the_score_threshold_is_measured_only_where_passages_are_embedded(docs, tmp_path, encoder):
    def measured():
        with Index.open(tmp_path / "index") as index:
            return ranking.measure_threshold(Encoder(encoder), index.vectors)

    first = operations.build([docs], tmp_path / "index", encoder=encoder).score_threshold
    assert first == measured()
    assert operations.delete([str(docs / "sea.txt")], tmp_path / "index").score_threshold == first
    (docs / "more.txt").write_text("bread and honey", encoding="utf-8")
    assert operations.update(tmp_path / "index").score_threshold == measured()


def test_a_folder_becomes_an_index_that_finds(docs, tmp_path, encoder, embeddings):
    record = operations.build([docs], tmp_path / "index", encoder=encoder)
    assert record.rows == len(rows_of(tmp_path / "index")) == len(embeddings)
    assert files_of(tmp_path / "index") == {"kitchen.md": 2, "rows.jsonl": 2, "sea.txt": record.rows - 4}
    check(tmp_path / "index", encoder)
    with Index.open(tmp_path / "index") as index:
        [hit] = index.search("old castle", 1)
        assert (hit.text, hit.source, hit.place) == ("old castle wall", "http://a/castle", "row 1")
        [hit] = index.search("spoon cup", 1)
        assert (hit.title, hit.place) == ("Kitchen > Table", "line 7")
        assert hit.source == str(docs / "kitchen.md")
    [skipped] = layout.read_skipped(tmp_path / "index", record)
    assert skipped.source == str(docs / "broken.pdf")
    assert skipped.reason.startswith("broken")
    # Passages of one document are neighbours, those of another are not.
    assert [(row.document, row.position) for row in rows_of(tmp_path / "index")[:5]] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (3, 0),
        (4, 0),
    ]


def test_building_again_changes_nothing_and_loads_no_encoder(docs, tmp_path, encoder, embeddings, monkeypatch):
    first = operations.build([docs], tmp_path / "index", encoder=encoder)
    embeddings.clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert operations.build([docs], tmp_path / "index", encoder=encoder).snapshot == first.snapshot
    assert operations.update(tmp_path / "index").snapshot == first.snapshot
    assert embeddings == []
    os.utime(docs / "sea.txt")  # another stamp, the same bytes
    monkeypatch.setattr(storage, "SETTLED_SECONDS", -3600.0)
    (docs / "broken.pdf").unlink()
    operations.update(tmp_path / "index")
    monkeypatch.setattr(reader, "digest", None)  # the new stamp is known, nothing is hashed again
    again = operations.update(tmp_path / "index")
    assert (again.snapshot, again.rows) == (first.snapshot + 1, first.rows)
    assert embeddings == []


@pytest.mark.parametrize("changed", ["time of change", "no time of change"])
def test_another_file_with_the_old_one_s_times(docs, tmp_path, encoder, monkeypatch, changed):
    """tar, rsync and git set times of modification: equal sizes and times do not prove that the file is equal."""
    plain = storage.stamp
    monkeypatch.setattr(storage, "SETTLED_SECONDS", -3600.0)
    if changed == "no time of change":
        monkeypatch.setattr(storage, "stamp", lambda path: [*plain(path)[:2], 0, 0])
    for text in ("white snow", "black coal"):
        write(docs / "sea.txt", text)
        os.utime(docs / "sea.txt", ns=(10**18, 10**18))
        operations.build([docs], tmp_path / "index", encoder=encoder)
        assert text in [row.text for row in rows_of(tmp_path / "index")]


def test_an_update_embeds_what_is_new_and_drops_what_is_gone(docs, tmp_path, encoder, embeddings):
    index = tmp_path / "index"
    operations.build([docs], index, encoder=encoder)
    embeddings.clear()
    write(docs / "kitchen.md", "# Kitchen\n\nbread in the hot oven\n\n## Table\n\nplain glass\n")
    write(docs / "new.txt", "white snow")
    (docs / "more" / "rows.jsonl").rename(docs / "rows.jsonl")
    (docs / "sea.txt").unlink()
    operations.update(index)
    assert sorted(embeddings) == ["Kitchen > Table\nplain glass", "new\nwhite snow"]
    assert files_of(index) == {"kitchen.md": 2, "new.txt": 1, "rows.jsonl": 2}
    check(index, encoder)


def test_a_file_that_has_become_unreadable_is_gone(docs, tmp_path, encoder):
    index = tmp_path / "index"
    operations.build([docs], index, encoder=encoder)
    write(docs / "sea.txt", b"\xff\0" + b"text " * 99)
    write(docs / "kitchen.md", "\n")
    record = operations.update(index)
    assert files_of(index) == {"rows.jsonl": 2}
    reasons = {Path(each.source).name: each.reason for each in layout.read_skipped(index, record)}
    assert reasons["kitchen.md"] == "holds no text"
    assert "not UTF-8" in reasons["sea.txt"]


def test_add_and_delete(docs, tmp_path, encoder, embeddings):
    index, other = tmp_path / "index", write(tmp_path / "other" / "a.txt", "green grass")
    operations.build([docs], index, encoder=encoder)
    before = rows_of(index)
    embeddings.clear()
    operations.add([other.parent], index)
    assert embeddings == ["a\ngreen grass"]
    assert len(rows_of(index)) == len(before) + 1
    assert operations.add([other.parent], index).snapshot == 2
    operations.delete([str(docs / "more"), str(other)], index)
    assert set(files_of(index)) == {"kitchen.md", "sea.txt"}
    check(index, encoder)
    operations.update(index)
    assert set(files_of(index)) == {"kitchen.md", "sea.txt"}, "what was deleted came back"
    operations.add([docs / "more"], index)
    operations.update(index)
    assert files_of(index)["rows.jsonl"] == 2
    # The excluded file is still listed.
    assert len(layout.read_skipped(index, layout.read(index)[0])) == 1


def test_building_from_other_paths_leaves_nothing_of_the_first(docs, tmp_path, encoder):
    index, other = tmp_path / "index", write(tmp_path / "a.txt", "green grass")
    operations.build([docs], index, encoder=encoder)
    operations.build([other], index)
    assert files_of(index) == {"a.txt": 1}
    assert layout.read_skipped(index, layout.read(index)[0]) == []


def test_excluded_files_are_recorded_even_if_no_passage_changes(docs, tmp_path, encoder):
    index, bad = tmp_path / "index", write(tmp_path / "more.pdf", b"%PDF-1.4")
    operations.build([docs], index, encoder=encoder)
    record = operations.add([bad], index)
    assert [Path(each.source).name for each in layout.read_skipped(index, record)] == ["broken.pdf", "more.pdf"]
    assert operations.add([bad], index).snapshot == record.snapshot
    check(index, encoder)
    bad.unlink()
    with pytest.raises(UserError, match=r"more\.pdf is not there any more: bring it back, or delete it"):
        operations.update(index)
    record = operations.delete([str(bad)], index)
    assert [Path(each.source).name for each in layout.read_skipped(index, record)] == ["broken.pdf"]
    assert operations.update(index).snapshot == record.snapshot
    with Index.open(index) as opened:
        opened.verify()


def test_a_folder_that_was_added_empty_is_read_by_a_later_update(docs, tmp_path, encoder):
    index, later = tmp_path / "index", tmp_path / "later"
    operations.build([docs], index, encoder=encoder)
    later.mkdir()
    operations.add([later], index)
    write(later / "a.txt", "green grass")
    operations.update(index)
    assert "a.txt" in files_of(index)


@pytest.mark.parametrize("name", ["manifest.json", "partial/notes.txt", "table.arrow"])
def test_a_folder_of_something_else_is_not_taken_for_an_index(docs, tmp_path, name):
    folder = tmp_path / "mine"
    write(folder / name, '{"name": "an extension", "about": {}}')
    with pytest.raises(UserError, match=r"mine is not an index and holds other files, such as .*: pass --index a new"):
        operations.build([docs], folder, encoder=operations.NO_ENCODER)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [Path(name).name]


def test_an_index_of_another_version_is_not_replaced(docs, tmp_path):
    index = tmp_path / "index"
    operations.build([docs], index, encoder=operations.NO_ENCODER)
    about = json.loads((index / layout.MANIFEST).read_text())
    about["about"]["version"] = 9
    (index / layout.MANIFEST).write_text(json.dumps(about))
    with pytest.raises(UserError, match="is a retrieval index of version 9, of another OpenChatKit: remove it first"):
        operations.build([docs], index, encoder=operations.NO_ENCODER)
    assert (index / layout.file_name("table", 1)).exists()


def test_scripts_without_spaces_are_cut_to_size_and_found_by_parts_of_words(tmp_path):
    rule = "图书馆每天早上八点开门，晚上九点关门。"  # noqa: RUF001
    write(tmp_path / "docs" / "zh.txt", "".join(f"第{number}条规定，{rule}" for number in range(200)))  # noqa: RUF001
    write(tmp_path / "docs" / "ko.txt", "도서관은 아침 여덟 시에 문을 엽니다.\n\n# 물은 정수기에서 마십니다.")
    write(tmp_path / "docs" / "th.txt", "ห้องสมุดเปิดทุกวันเวลาแปดโมงเช้า")
    write(tmp_path / "docs" / "ru.txt", "Библиотека открывается ежедневно. " * 200)
    operations.build([tmp_path / "docs"], tmp_path / "index", encoder=operations.NO_ENCODER)
    with Index.open(tmp_path / "index") as index:
        sizes = {name: [] for name in ("zh", "ko", "th", "ru")}
        for row in index.table.rows():
            sizes[Path(row.source).stem].append(len(row.text))
        assert max(sizes["zh"]) <= 210
        assert max(sizes["ru"]) <= 800
        for question, name in {"도서관": "ko", "물": "ko", "ห้องสมุด": "th", "关门": "zh", "библиотека": "ru"}.items():
            assert {Path(hit.source).stem for hit in index.search(question)} == {name}
        for remark in ("안녕하세요", "你好", "สวัสดีครับ", "今天天气怎么样?", "오늘 날씨 어때요?"):
            assert index.search(remark) == []


def test_what_a_project_ignores_is_read_if_the_index_was_made_so(tmp_path):
    write(tmp_path / "docs" / ".gitignore", "*.txt\n")
    write(tmp_path / "docs" / "a.txt", "kept out")
    write(tmp_path / "docs" / "a.md", "kept in")
    sizes = []
    for name, settings in (("with", {"include_ignored": True}), ("without", {})):
        options = {"encoder": operations.NO_ENCODER, "settings": settings}
        operations.build([tmp_path / "docs"], tmp_path / name, **options)
        write(tmp_path / "docs" / "b.txt", "more")
        sizes.append(operations.update(tmp_path / name).sources)
    assert sizes == [3, 1]
    with pytest.raises(UserError, match="--include-ignored False, not True"):
        operations.build([tmp_path / "docs"], tmp_path / "without", settings={"include_ignored": True})


def test_an_index_can_be_named_by_relative_paths_and_links(docs, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.chdir(index)
    operations.build([docs], Path("."), encoder=operations.NO_ENCODER)
    assert len(files_of(index)) == 3
    (tmp_path / "link").symlink_to(index)
    assert layout.lock_path(Path(".")) == layout.lock_path(tmp_path / "link") == layout.lock_path(index)


def test_settings_are_compared_after_waiting_for_another_writer(docs, tmp_path, encoder, monkeypatch):
    index, writing = tmp_path / "index", assembly.snapshot.lock_for_writing

    @contextlib.contextmanager
    def late(folder: Path) -> object:
        monkeypatch.setattr(assembly.snapshot, "lock_for_writing", writing)
        operations.build([docs], index, encoder=encoder, settings={"tokens": 20})
        with writing(folder):
            yield

    monkeypatch.setattr(assembly.snapshot, "lock_for_writing", late)
    with pytest.raises(UserError, match="was made with --chunk-tokens 20, not 30"):
        operations.build([docs], index, encoder=encoder, settings={"tokens": 30})
    monkeypatch.setattr(assembly.snapshot, "lock_for_writing", late)
    with pytest.raises(UserError, match=r"was made with --encoder .*tiny, not none"):
        operations.build([docs], index, encoder=operations.NO_ENCODER)
    check(index, encoder)


def test_an_index_of_files_is_not_replaced_by_a_set_of_rows(docs, tmp_path):
    index, rows = tmp_path / "index", [plan.make_row("green grass", "", "a", "", 0, 0)]
    source = plan.NewSource("set", "digest", [1, 0, 0, 0], lambda _: iter(rows))
    operations.build([docs], index, encoder=operations.NO_ENCODER)
    with pytest.raises(UserError, match=r"is an index of other things, such as .*kitchen.md: pass another --index"):
        operations.build_rows(source, index, encoder=operations.NO_ENCODER)
    assert operations.build_rows(source, tmp_path / "set", encoder=operations.NO_ENCODER).rows == 1
    changed = dataclasses.replace(source, digest="other", rows=lambda _: iter(rows * 2))
    assert operations.build_rows(changed, tmp_path / "set", encoder=None).rows == 2
    assert operations.build_rows(changed, tmp_path / "set", encoder=None).snapshot == 2


def test_an_index_inside_a_source_folder_is_not_read(docs, encoder):
    operations.build([docs], docs / "index", encoder=encoder)
    record = operations.build([docs], docs / "index")
    assert record.snapshot == 1
    assert record.sources == 3


def test_an_index_without_an_encoder_is_searched_by_words(docs, tmp_path):
    record = operations.build([docs], tmp_path / "index", encoder=operations.NO_ENCODER)
    assert record.encoder is None
    with Index.open(tmp_path / "index") as index:
        assert index.search("castle", 1)[0].text == "old castle wall"
    write(docs / "a.txt", "green grass")
    assert operations.update(tmp_path / "index").sources == 4


def test_settings_are_kept_and_others_refused(docs, tmp_path, encoder):
    index, settings = tmp_path / "index", {"tokens": 20, "overlap": 0}
    operations.build([docs], index, encoder=encoder, settings=settings)
    rows = len(rows_of(index))
    assert layout.read(index)[0].chunking["tokens"] == 20
    write(docs / "sea.txt", "fish wave salt water " * 20)
    operations.update(index)
    assert len(rows_of(index)) > rows
    operations.build([docs], index, settings=settings)
    with pytest.raises(
        UserError, match=r"was made with --chunk-tokens 20, not 21; --encoder .*tiny, not none: leave these out"
    ):
        operations.build([docs], index, encoder="none", settings={"tokens": 21, "overlap": 0})
    other = make_encoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"--encoder .*tiny, not .*other"):
        operations.build([docs], index, encoder=str(other))
    with pytest.raises(UserError, match="sees 62 tokens"):
        operations.build([docs], tmp_path / "new", encoder=encoder, settings={"tokens": 63})
    assert not (tmp_path / "new").exists()


def test_an_encoder_that_has_changed_is_refused(docs, tmp_path):
    folder = make_encoder(tmp_path / "encoder")
    operations.build([docs], tmp_path / "index", encoder=str(folder))
    make_encoder(folder, seed=1)
    write(docs / "new.txt", "white snow")
    with pytest.raises(UserError, match="is not the one that"):
        operations.update(tmp_path / "index")


def test_nothing_to_read_is_an_error(tmp_path, docs, encoder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file to read there: expected files of these kinds: \.txt"):
        operations.build([tmp_path / "empty"], tmp_path / "index", encoder=encoder)
    assert not (tmp_path / "index").exists()
    with pytest.raises(
        UserError, match=r"no text to make an index of; 1 files .* were excluded: .*broken\.pdf \(broken"
    ):
        operations.build([docs / "broken.pdf"], tmp_path / "index", encoder=encoder)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        operations.build([tmp_path / "nowhere"], tmp_path / "index", encoder=encoder)
    assert not layout.exists(tmp_path / "index")
    for change in (lambda: operations.update(tmp_path / "index"), lambda: operations.add([docs], tmp_path / "index")):
        with pytest.raises(UserError, match="expected a retrieval index"):
            change()


def test_deleting_unknown_paths_or_everything_is_an_error(docs, tmp_path, encoder):
    operations.build([docs], tmp_path / "index", encoder=encoder)
    with pytest.raises(UserError, match=r"nothing: the index holds nothing from there; it holds .*kitchen\.md"):
        operations.delete([str(docs / "nothing")], tmp_path / "index")
    with pytest.raises(UserError, match=r"that is all that .* holds: remove the folder instead"):
        operations.delete([str(docs)], tmp_path / "index")


def test_a_missing_source_folder_is_an_error_not_an_empty_one(docs, tmp_path, encoder):
    operations.build([docs], tmp_path / "index", encoder=encoder)
    docs.rename(tmp_path / "away")
    with pytest.raises(UserError, match="docs is not there any more: bring it back, or delete it"):
        operations.update(tmp_path / "index")
    assert len(files_of(tmp_path / "index")) == 3


def test_only_build_replaces_a_damaged_index(docs, tmp_path, encoder):
    index = tmp_path / "index"
    operations.build([docs], index, encoder=encoder)
    with open(index / layout.file_name("table", 1), "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="it was cut or replaced; build the index again"):
        operations.update(index)
    operations.build([docs], index, encoder=encoder)
    check(index, encoder)
    (index / layout.MANIFEST).write_text("{", encoding="utf-8")
    operations.build([docs], index, encoder=encoder)
    check(index, encoder)


def test_a_file_that_changes_while_it_is_read_is_skipped(docs, tmp_path, encoder, monkeypatch):
    stage = assembly.plan.read_all

    def change_first(*args: object) -> object:
        write(docs / "sea.txt", "another text")
        return stage(*args)

    monkeypatch.setattr(assembly.plan, "read_all", change_first)
    record = operations.build([docs], tmp_path / "index", encoder=encoder)
    assert "sea.txt" not in files_of(tmp_path / "index")
    assert any("changed while it was read" in each.reason for each in layout.read_skipped(tmp_path / "index", record))


def test_a_file_that_disappears_while_it_is_read_is_skipped(docs, tmp_path, encoder, monkeypatch):
    read = reader.read

    def read_and_remove(path: Path, options: object) -> object:
        yield from read(path, options)
        path.unlink() if path.name == "sea.txt" else None

    monkeypatch.setattr(reader, "read", read_and_remove)
    record = operations.build([docs], tmp_path / "index", encoder=encoder)
    assert set(files_of(tmp_path / "index")) == {"kitchen.md", "rows.jsonl"}
    reasons = [each.reason for each in layout.read_skipped(tmp_path / "index", record)]
    assert "cannot be read: No such file or directory" in reasons


def test_vectors_are_found_by_digest_and_the_first_counts():
    found = vector_cache.KnownVectors(2)
    assert list(found.locate(np.array([b"a"], vector_cache.KEYS))) == [-1]
    digests = [vector_cache.text_digest(text) for text in "abc"]
    found.add(vector_cache.as_keys(iter(digests[:2]), 2), np.array([[1, 2], [3, 4]], np.float16))
    found.add(vector_cache.as_keys(iter(digests[1:]), 2), np.array([[5, 6], [7, 8]], np.float16))
    rows = found.locate(vector_cache.as_keys(iter([*digests, b"\0" * 16]), 4))
    assert rows.tolist() == [0, 1, 3, -1]
    assert found.take(rows[:3]).tolist() == [[1, 2], [3, 4], [7, 8]]


def test_an_incomplete_vector_does_not_count(tmp_path, encoder):
    record = Encoder(encoder).record()
    vector_cache.start(tmp_path / "partial", record)
    with vector_cache.VectorWriter(tmp_path / "partial", 0, 32) as writer:
        writer.add([vector_cache.text_digest("a"), vector_cache.text_digest("b")], np.ones((2, 32), np.float32))
    vectors = tmp_path / "partial" / "vectors-0.bin"
    os.truncate(vectors, 64 + 10)
    [(found, values)] = vector_cache.read_parts(tmp_path / "partial", 32)
    assert found.tolist() == [vector_cache.text_digest("a")]
    assert values.shape == (1, 32)
    with vector_cache.VectorWriter(tmp_path / "partial", 0, 32) as writer:
        writer.add([vector_cache.text_digest("c")], np.zeros((1, 32), np.float32))
    [(found, values)] = vector_cache.read_parts(tmp_path / "partial", 32)
    assert found.tolist() == [vector_cache.text_digest("a"), vector_cache.text_digest("c")]
    assert values[1].any() == np.False_


class TestKills:
    """SIGKILL in the middle: the previous index still answers, and the same command resumes."""

    SLOW = """
import sys, time
from pathlib import Path
from openchatkit.retrieval.building import operations
from openchatkit.retrieval.building import assembly
from openchatkit.retrieval.encoder import Encoder
assembly._SLICE = 4
encode = Encoder.encode
def slowly(self, texts, **options):
    time.sleep(0.05)
    return encode(self, texts, **options)
Encoder.encode = slowly
operations.build([Path(sys.argv[1])], Path(sys.argv[2]), encoder=sys.argv[3])
"""

    def start(self, python: Path, docs: Path, index: Path, encoder: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([python, "-c", self.SLOW, docs, index, encoder], env=environment)

    def kept(self, index: Path) -> int:
        path = layout.partial_folder(index) / "keys-0.bin"
        return path.stat().st_size // vector_cache.SIZE if path.exists() else 0

    def test_embedding_resumes_after_a_kill(self, tmp_path, encoder, embeddings, quick_python):
        docs, index = tmp_path / "docs", tmp_path / "index"
        write(docs / "old.txt", "the old text")
        operations.build([docs], index, encoder=encoder)
        for number in range(200):
            words = " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 9))
            write(docs / f"{number}.txt", words)
        process = self.start(quick_python, docs, index, encoder)
        try:
            while self.kept(index) < 20:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        kept = self.kept(index)
        with Index.open(index) as before:
            assert before.search("old text", 1)[0].text == "the old text"
        embeddings.clear()
        operations.build([docs], index, encoder=encoder)
        assert len(embeddings) == 200 - kept
        check(index, encoder)

    def test_vectors_of_another_encoder_are_not_reused(self, tmp_path, encoder, embeddings):
        partial = layout.partial_folder(tmp_path / "index")
        vector_cache.start(partial, Encoder(encoder).record())
        with vector_cache.VectorWriter(partial, 0, 32) as writer:
            writer.add([vector_cache.text_digest("a\ngreen grass")], np.ones((1, 32), np.float32))
        other = str(make_encoder(tmp_path / "other", seed=1))
        operations.build([write(tmp_path / "a.txt", "green grass")], tmp_path / "index", encoder=other)
        assert embeddings == ["a\ngreen grass"]
        check(tmp_path / "index", other)


class TestSeveralProcesses:
    """The command under torchrun: each process embeds its part, and none hangs."""

    @pytest.fixture(autouse=True)
    def python(self, quick_python):
        self.python = quick_python

    def run(self, *arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
        script = Path(__file__).parents[2] / "retrieval" / "build_index.py"
        if code:
            script = write(Path(str(arguments[-1])) / "script.py", code)
            arguments = arguments[:-1]
        launch = [self.python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, env=environment)

    def test_two_processes_make_the_same_index_as_one(self, docs, tmp_path, encoder):
        alone, together = tmp_path / "alone", tmp_path / "together"
        operations.build([docs], alone, encoder=encoder)
        result = self.run("build", docs, "--index", together, "--encoder", encoder, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("broken.pdf") == 1
        assert rows_of(alone) == rows_of(together)
        check(together, encoder)

    def test_a_failure_of_one_process_stops_all(self, docs, tmp_path, encoder):
        code = f"""
import os, sys
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.command import main
from openchatkit import storage
from openchatkit.errors import UserError
def refuse(self, texts, **options):
    if os.environ["RANK"] == "1":
        raise UserError("no more memory")
    return encode(self, texts, **options)
encode, Encoder.encode = Encoder.encode, refuse
main(["build", {str(docs)!r}, "--index", {str(tmp_path / "index")!r}, "--encoder", {encoder!r}, "--device", "cpu"])
"""
        result = self.run(tmp_path, code=code)
        assert result.returncode != 0
        assert "error: process 1 stopped: no more memory" in result.stderr
        assert not layout.exists(tmp_path / "index")

    def test_a_failure_of_the_first_process_stops_all(self, tmp_path, encoder):
        (tmp_path / "empty").mkdir()
        result = self.run("build", tmp_path / "empty", "--index", tmp_path / "index", "--encoder", encoder)
        assert result.returncode != 0
        assert "error: no file to read there" in result.stderr


def test_a_second_writer_waits_with_a_message(docs, tmp_path, encoder, quick_python):
    index = tmp_path / "index"
    holder = f"""
import sys, time
from pathlib import Path
from openchatkit.retrieval.snapshot import lock_for_writing
with lock_for_writing(Path({str(index)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [quick_python, "-c", holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        script = Path(__file__).parents[2] / "retrieval" / "build_index.py"
        arguments = ["build", docs, "--index", index, "--encoder", encoder]
        second = subprocess.Popen([quick_python, script, *arguments], stderr=subprocess.PIPE, text=True)
        assert second.stderr.readline() == f"{index} is being written to by another process: waiting for it\n"
        assert not layout.exists(index)
        process.stdin.close()
        assert second.wait() == 0
        second.stderr.close()
    assert json.loads((index / layout.MANIFEST).read_text())["about"]["rows"] > 0
