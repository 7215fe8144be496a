"""`index`, `snapshot` and `passage`: searching, kills while writing, and damaged files."""

import os
import re
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from index_maker import TEXTS, WordEncoder, make

from openchatkit import storage
from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.manifest import DamagedError
from openchatkit.retrieval import snapshot
from openchatkit.retrieval.index import Index, verify
from openchatkit.retrieval.passage import Hit, merge_copies
from openchatkit.retrieval.ranking import NO_COSINE
from openchatkit.retrieval.table import PassageRow

pytest.importorskip("faiss")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mode", ["fused", "dense", "sparse"])
def test_a_passage_is_found_with_its_place(folder, encoder, mode):
    with Index.open(folder, encoder) as index:
        hit = index.search("sourdough bread", 3, mode=mode, score_threshold=False)[0]
    assert (hit.text, hit.title, hit.source, hit.place, hit.id) == (TEXTS[3], "title 3", "notes.txt", "line 4", 3)
    assert hit.sparse > 0
    assert hit.dense is None if mode == "sparse" else 0.5 < hit.dense <= 1.001


@pytest.mark.parametrize("query", ["hello", "thanks!", "who are you", "", "  ", "?"])
def test_small_talk_finds_nothing(folder, encoder, query):
    with Index.open(folder, encoder) as index:
        for mode in ("fused", "dense", "sparse"):
            assert index.search(query, mode=mode) == []


ERRORS = [f"The device stopped: {part} {number} gave no answer." for number, part in enumerate(["pump", "valve"] * 30)]


@pytest.mark.parametrize("with_vectors", [True, False])
def test_a_rare_word_of_a_question_finds_its_passage_by_title_or_text(tmp_path, encoder, with_vectors):
    encoder = encoder if with_vectors else None
    texts = [*ERRORS, "There is a gizmo on the shelf beside the red lamp."]
    titles = [*(f"Errors > E{4000 + at}" for at in range(60)), "News"]
    make(tmp_path, texts, titles=titles, encoder=encoder)
    with Index.open(tmp_path, encoder) as index:
        for question in ("What does E4021 mean?", "e4021", "My neighbour's boiler shows E4021 on its panel, why?"):
            assert index.search(question)[0].title == "Errors > E4021"
        for question in ("What is a gizmo?", "GIZMO", "Where did you put the gizmos yesterday?"):
            assert index.search(question)[0].title == "News"
        assert index.search("What does E5021 mean?") == []


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_word_is_found_in_a_small_index_even_if_all_passages_contain_it(tmp_path, count):
    make(tmp_path, [f"Part {at} of the gizmo is made of {what}." for at, what in enumerate(["tin"] * count)])
    with Index.open(tmp_path) as index:
        assert len(index.search("What is the gizmo?", 3)) == min(count, 3)
        assert index.search("What is the sprocket?") == []


@pytest.mark.parametrize("with_vectors", [True, False])
def test_stop_words_and_one_word_of_many_find_nothing(tmp_path, encoder, with_vectors):
    encoder = encoder if with_vectors else None
    said = ["Hello and welcome, have a nice day.", "Tell me a joke, I am bored.", "Danke, bis morgen!", "你好,谢谢。"]
    make(tmp_path, [*said, *ERRORS], encoder=encoder)
    with Index.open(tmp_path, encoder) as index:
        rows = np.arange(4)
        for remark in ("Hello, nice day!", "Tell me a joke", "I'm so bored today", "Danke!", "谢谢你好"):
            assert not index.sparse.shares(remark, rows).any()
        question = "Which pumps did Roman, Greek and Persian engineers invent?"
        assert index.sparse.shares(question, np.arange(len(said), 64)).max() < 0.3
        assert index.search(question) == []


def test_the_score_threshold_defaults_to_that_of_the_index(tmp_path, encoder):
    high = layout.ScoreThreshold(cosine=2, weak_cosine=2, strength=9, strength_alone=9)
    make(tmp_path, encoder=encoder, score_threshold=high)
    with Index.open(tmp_path, encoder) as index:
        assert index.search("sourdough bread") == []
        assert index.search("sourdough bread", score_threshold=False)
        assert index.search("sourdough bread", score_threshold=layout.ScoreThreshold(0.3, 0, 1, 1))


def test_k_may_exceed_the_number_of_rows_or_be_0(folder, encoder):
    with Index.open(folder, encoder) as index:
        assert len(index.search("sourdough bread", 1000, score_threshold=False)) == len(TEXTS)
        assert index.search("sourdough bread", 0) == []
        scores, rows = index.search_vectors(encoder.encode(TEXTS), 99)
        assert rows.shape == scores.shape == (5, 5)
        assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(UserError, match="no mode 'both'"):
            index.search("x", mode="both")
        with pytest.raises(UserError, match="not finite"):
            index.search_vectors(np.full((1, 256), np.nan), 1)


def test_without_an_encoder_it_is_searched_by_words(tmp_path):
    make(tmp_path)
    with Index.open(tmp_path) as index:
        hits = index.search("sourdough bread")
        assert [hit.id for hit in hits] == [3]
        assert hits[0].dense is None
        with pytest.raises(UserError, match="searched by words alone"):
            index.search("bread", mode="dense")
        with pytest.raises(UserError, match="holds no vectors"):
            index.search_vectors(np.ones((1, 256)), 1)
    with pytest.raises(UserError, match="made without an encoder"):
        Index.open(tmp_path, WordEncoder())


NAMES = ["json", "json.dumps", "json.dump", "json.load", "json.loads", "json.tool"]
SENTENCES = ["Encode.", "Write json as json text.", "Write json.", "Read json.", "Read json text.", "Check json."]


def test_without_vectors_a_passage_named_by_its_whole_title_comes_first(tmp_path):
    make(tmp_path, [f"{name}: {said}" for name, said in zip(NAMES, SENTENCES, strict=True)], titles=NAMES)
    with Index.open(tmp_path) as index:
        for name in NAMES:
            hits = index.search(f"What does {name} do?", 6)
            assert hits[0].title == name
            assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert index.search("What does json.nothing do?") == []


def test_the_score_threshold_applies_to_each_passage(folder, encoder):
    with Index.open(folder, encoder) as index:
        # By meaning alone the second of these would be the first.
        first, second, *_ = index.search("three boils twice object zebra", 5, score_threshold=False)
        assert first.dense < second.dense
        between = (first.dense + second.dense) / 2
        floor = layout.ScoreThreshold(cosine=between, weak_cosine=1.0, strength=9.0, strength_alone=9.0)
        assert index.search("three boils twice object zebra", 5, score_threshold=floor) == [second]


@pytest.mark.parametrize("with_vectors", [True, False])
def test_copies_of_a_text_are_one_hit_with_all_places(tmp_path, encoder, with_vectors):
    encoder = encoder if with_vectors else None
    texts = [*["Sourdough bread rises\n overnight.", "Sourdough bread rises overnight."] * 60, "Sourdough needs salt."]
    rows = [PassageRow(text, f"t{at}", f"{at}.txt", "line 1", bytes([at]), at) for at, text in enumerate(texts)]
    vectors = [encoder.encode(texts)] if encoder else None
    made_with = encoder.record() if encoder else None
    with snapshot.lock_for_writing(tmp_path):
        snapshot.write_snapshot(tmp_path, rows=rows, vectors=vectors, encoder=made_with)
    with Index.open(tmp_path, encoder) as index:
        first, second = index.search("sourdough bread overnight", 2, score_threshold=False)
        assert sorted([len(first.also), len(second.also)]) == [0, 119]
        assert {first.where, *first.also, second.where, *second.also} == {f"{at}.txt, line 1" for at in range(121)}
        assert len(index.search("sourdough bread overnight", 1, score_threshold=False)[0].also) >= 99


def test_the_same_text_under_two_headings_of_a_file_is_two_passages():
    hits = [Hit("Run setup.", title, "a.md", place, 1.0, at) for at, (title, place) in enumerate([("A", "line 2")] * 2)]
    hits += [Hit("Run setup.", "B", "a.md", "line 9", 1.0, 2), Hit("Run  setup.", "B", "b.md", "page 1", 1.0, 3)]
    found = merge_copies(hits, 5)
    assert [(hit.id, hit.also) for hit in found] == [(0, ("a.md, line 2", "b.md, page 1")), (2, ())]
    assert [hit.id for hit in merge_copies(hits, 1)] == [0]


def test_another_encoder_is_refused(folder, encoder):
    encoder.digest = "e" * 64
    with pytest.raises(UserError, match=r"encoder words \(SHA-256 eeee.*is not the one that .* was made with"):
        Index.open(folder, encoder)


def test_a_new_snapshot_replaces_the_old_one_and_open_readers_keep_theirs(folder, encoder):
    with Index.open(folder, encoder) as old:
        record = make(folder, [*TEXTS, "A violin has four strings."], encoder=encoder)
        assert record.snapshot == 2
        assert all("000002" in name for name in names(folder) if name != layout.MANIFEST)
        assert old.search("violin strings") == []
        assert old.search("sourdough bread")[0].id == 3
        assert old.info()["generation"] == 1
    with Index.open(folder, encoder) as new:
        assert new.search("violin strings")[0].id == 5
        assert new.info()["generation"] == 2


def test_a_snapshot_may_be_made_from_the_previous_one(folder, encoder):
    with Index.open(folder, encoder) as old, snapshot.lock_for_writing(folder):
        rows, kept = list(old.table.rows(1)), old.vectors[1:]
        options = {"encoder": old.record.encoder, "score_threshold": old.record.score_threshold}
        snapshot.write_snapshot(folder, rows=iter(rows), vectors=[kept], **options)
    with Index.open(folder, encoder) as new:
        assert new.record.rows == 4
        assert new.search("sourdough bread")[0].id == 2
        assert new.search("lighthouse keeper") == []
        np.testing.assert_allclose(new.vectors, kept, atol=1e-3)


@pytest.mark.parametrize(
    "step", ["table.write", "vector_store.write", "dense.build", "sparse.build", "_publish", "layout.write"]
)
def test_a_failure_at_any_step_leaves_the_old_index_and_nothing_else(folder, encoder, monkeypatch, step):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    owner, _, name = step.rpartition(".")
    monkeypatch.setattr(getattr(snapshot, owner) if owner else snapshot, name, stop)
    with pytest.raises(KeyboardInterrupt):
        make(folder, ["something else"], encoder=encoder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_killed_writer_leaves_the_old_index_and_the_next_one_cleans_up(folder, encoder, quick_python):
    code = f"""
import os, pathlib, signal
from index_maker import WordEncoder, make
from openchatkit.retrieval import snapshot
snapshot.layout.write = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
make(pathlib.Path({str(folder)!r}), ["something else"], encoder=WordEncoder())
"""
    killed = subprocess.run([quick_python, "-c", code], cwd=Path(__file__).parent, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert layout.stale_files(folder)
    with Index.open(folder, encoder) as index:
        assert index.search("sourdough bread")[0].id == 3
    assert make(folder, ["A violin has four strings."], encoder=encoder).snapshot == 2
    assert not layout.stale_files(folder)
    with Index.open(folder, encoder) as index:
        assert index.search("violin strings")[0].id == 0


def test_the_next_writer_removes_stale_files(folder, encoder):
    (folder / layout.file_name("table", 2)).write_bytes(b"half")
    layout.temporary_path(folder, 2).write_bytes(b"half")
    with Index.open(folder, encoder) as index:
        assert index.search("sourdough bread")
    with snapshot.lock_for_writing(folder):
        pass
    assert all("000001" in name for name in names(folder) if name != layout.MANIFEST)


def test_an_index_of_nothing_is_refused(folder, encoder):
    with pytest.raises(UserError, match="no passage to put into"):
        make(folder, [], encoder=encoder)
    Index.open(folder, encoder).close()


def test_bad_vectors_and_metrics_are_refused_and_the_old_index_stays(folder, encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode", lambda texts, **_: np.full((len(texts), 256), np.nan))
    with pytest.raises(UserError, match="not finite"):
        make(folder, encoder=encoder, score_threshold=NO_COSINE)
    monkeypatch.setattr(encoder, "record", lambda: layout.EncoderRecord("words", encoder.digest, 256, "manhattan", 128))
    with pytest.raises(UserError, match="words compares by 'manhattan'"):
        make(folder, encoder=encoder, score_threshold=NO_COSINE)
    assert layout.read(folder)[0].snapshot == 1


def test_two_writers_wait_for_each_other(tmp_path, encoder):
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: make(tmp_path / "index", encoder=encoder).snapshot, range(2)))
    assert sorted(done) == [1, 2]
    Index.open(tmp_path / "index", encoder).close()


def test_opening_while_snapshots_are_written_finds_a_complete_one(folder, encoder):
    stop = threading.Event()

    def write():
        for _ in range(8):
            make(folder, encoder=encoder)
        stop.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not stop.is_set() and not writing.done():
            with Index.open(folder, encoder) as index:
                assert index.search("sourdough bread")[0].id == 3
        writing.result()


@pytest.mark.parametrize("role", layout.ROLES)
def test_any_change_to_any_file_is_refused_by_name(folder, encoder, role):
    path = folder / layout.file_name(role, 1)
    whole = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    if whole:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        os.utime(path, ns=(stamp, stamp))  # what only hashing can see
        with pytest.raises(DamagedError, match=f"{re.escape(path.name)} was altered"):
            verify(folder)
    for content, message in ((whole + b"x", "bytes, the manifest says"), (None, "is missing")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(path.name)} (has )?.*{message}"):
            Index.open(folder, encoder)
        with pytest.raises(UserError, match=re.escape(path.name)):
            verify(folder)


def test_a_copy_opens_after_it_was_verified(folder, encoder):
    path = folder / layout.file_name("vectors", 1)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"vectors-000001\.npy was written to or copied"):
        Index.open(folder, encoder)
    verify(folder)
    with Index.open(folder, encoder) as index:
        index.verify()
        assert index.search("sourdough bread")


def test_a_snapshot_written_during_verify_is_not_damage(folder, encoder, monkeypatch):
    sha256, done = storage.sha256, []

    def write_first(path):
        if not done:
            done.append(path)
            make(folder, encoder=encoder)
        return sha256(path)

    monkeypatch.setattr("openchatkit.retrieval.index.storage.sha256", write_first)
    verify(folder)
    assert layout.read(folder)[0].snapshot == 2
    (folder / layout.file_name("table", 2)).unlink()
    with pytest.raises(DamagedError, match=r"table-000002\.arrow is missing"):
        verify(folder)


def test_info_has_the_size_of_all_files(folder, encoder):
    with Index.open(folder, encoder) as index:
        info = index.info()
    sizes = [path.stat().st_size for path in folder.iterdir() if path.name != layout.MANIFEST]
    assert info["bytes"] == sum(sizes)
    assert (info["rows"], info["encoder"]["name"], info["dense"]["recall"]) == (5, "words", 1.0)
