"""A long-lived reader of an index while others write snapshots."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from index_maker import TEXTS, WordEncoder, make

from openchatkit.formats import retrieval_index as layout
from openchatkit.retrieval.index import Index
from openchatkit.retrieval.reloading_index import ReloadingIndex

pytest.importorskip("faiss")
VIOLIN = "A violin has four strings."


def found(live, query="violin strings"):
    return [hit.text for hit in live.search(query, 1)]


def test_a_new_snapshot_is_found_and_the_old_files_are_released(folder, encoder, warnings):
    live = ReloadingIndex(Index.open(folder, encoder))
    assert found(live) == []
    make(folder, [*TEXTS, VIOLIN], encoder=encoder)
    assert found(live) == [VIOLIN]
    assert found(live, "sourdough bread") == [TEXTS[3]]
    assert live.newest().encoder is encoder
    assert warnings == []
    if (maps := Path("/proc/self/maps")).exists():
        mapped = [line for line in maps.read_text().splitlines() if str(folder) in line]
        assert mapped
        assert not [line for line in mapped if "(deleted)" in line]


def test_a_snapshot_written_before_the_first_question_is_found(folder, encoder):
    live = ReloadingIndex(Index.open(folder, encoder))
    make(folder, [VIOLIN], encoder=encoder)
    assert found(live) == [VIOLIN]


def test_an_unchanged_manifest_is_read_once(folder, encoder, monkeypatch):
    live = ReloadingIndex(Index.open(folder, encoder))
    opened = live.newest()
    monkeypatch.setattr(layout, "read", lambda folder: pytest.fail("the manifest was read again"))
    assert live.newest() is opened


def test_an_index_without_vectors_is_reloaded_too(tmp_path):
    make(tmp_path / "index")
    live = ReloadingIndex(Index.open(tmp_path / "index"))
    make(tmp_path / "index", [*TEXTS, VIOLIN])
    assert found(live) == [VIOLIN]


def test_a_snapshot_that_cannot_be_opened_is_warned_of_once_and_used_when_it_can(folder, encoder, warnings):
    live = ReloadingIndex(Index.open(folder, encoder))
    make(folder, [*TEXTS, VIOLIN], encoder=encoder)
    hidden = folder / layout.file_name("postings", 2)
    hidden.rename(folder / "elsewhere")
    for _ in range(3):
        assert found(live, "sourdough bread") == [TEXTS[3]]
        assert found(live) == []
    (warning,) = warnings
    assert warning.startswith(f"{folder} was changed, and is searched as it was before: {hidden} is missing; ")
    (folder / "elsewhere").rename(hidden)
    assert found(live) == [VIOLIN]
    assert len(warnings) == 1


def test_a_removed_index_answers_until_there_is_one_again(folder, encoder, warnings):
    live = ReloadingIndex(Index.open(folder, encoder))
    assert found(live, "sourdough bread") == [TEXTS[3]]
    shutil.rmtree(folder)
    for _ in range(2):
        assert found(live, "sourdough bread") == [TEXTS[3]]
    assert len(warnings) == 1
    make(folder, [VIOLIN], encoder=encoder)  # of the first snapshot, as the one before was
    assert found(live) == [VIOLIN]


@pytest.mark.parametrize("other", [WordEncoder(), None])
def test_a_snapshot_with_another_encoder_is_warned_of_and_not_used(folder, encoder, warnings, other):
    live = ReloadingIndex(Index.open(folder, encoder))
    if other:
        other.digest = "e" * 64
    make(folder, [*TEXTS, VIOLIN], encoder=other)
    for _ in range(2):
        assert found(live) == []
        assert found(live, "sourdough bread") == [TEXTS[3]]
    (warning,) = warnings
    assert "it has another encoder now, which is loaded when this program is started again" in warning


def test_a_new_snapshot_is_searched_on_gpus_too(folder, encoder, monkeypatch):
    from fake_gpus import FakeGpus

    gpus = FakeGpus(monkeypatch)
    live = ReloadingIndex(Index.open(folder, encoder))
    make(folder, [*TEXTS, VIOLIN], encoder=encoder, dense_options={"kind": "IndexIVFScalarQuantizer"})
    assert found(live) == [VIOLIN]
    assert gpus.searches


def test_threads_search_while_snapshots_change(folder, encoder, warnings):
    live, stop = ReloadingIndex(Index.open(folder, encoder)), threading.Event()

    def ask():
        numbers = []
        while not stop.is_set():
            assert found(live, "sourdough bread") == [TEXTS[3]]
            (text,) = found(live, "number") or [f"number {0}"]
            numbers.append(int(text.split()[1]))
        return numbers

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(4)]
        try:
            for number in range(1, 9):
                make(folder, [*TEXTS, f"number {number}"], encoder=encoder)
        finally:
            stop.set()
        for each in asked:
            assert each.result() == sorted(each.result()), "a snapshot came back"
    assert found(live, "number") == ["number 8"]
    assert warnings == []
