"""The Wikipedia index at a small scale: fetched from a hub on this machine, converted, opened and searched."""

import hashlib
import os
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import wikipedia_maker as maker
from tiny_encoder import make_encoder

from openchatkit.download.retry import RetryPolicy
from openchatkit.errors import UserError
from openchatkit.formats.manifest import DamagedError
from openchatkit.formats.wikipedia_index import INDEX, PUBLISHED, TABLE
from openchatkit.paths import ROOT
from openchatkit.retrieval import blocks
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.wikipedia import index as wikipedia
from openchatkit.retrieval.wikipedia import preparation as wikipedia_preparation
from openchatkit.retrieval.wikipedia import table as wikipedia_table
from openchatkit.retrieval.wikipedia.index import WikipediaIndex
from openchatkit.retrieval.wikipedia.preparation import prepare

TEXTS = maker.snippets()
FLAT = [text for article in TEXTS for text in article]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    return Encoder(make_encoder(tmp_path_factory.mktemp("encoder") / "contriever", plain=True), device="cpu")


@pytest.fixture(scope="module")
def files(encoder) -> dict[str, bytes]:
    vectors = encoder.encode(FLAT)
    # At length 1, so that no snippet is nearer to another than that is to itself.
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return maker.published(TEXTS, vectors, columns=["id", "title"])


@pytest.fixture(scope="module")
def ready(tmp_path_factory, files) -> Path:
    source = maker.write(tmp_path_factory.mktemp("source"), files)
    folder = tmp_path_factory.mktemp("ready") / "files"
    prepare(folder, source=str(source), digests=digests(files))
    return folder


@pytest.fixture
def copy(ready, tmp_path) -> Path:
    """A whole index of a test's own, with the time stamps of the first."""
    import shutil

    return Path(shutil.copytree(ready, tmp_path / "copy"))


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}


def test_it_is_fetched_from_the_hub_and_converted_once(hub, files, tmp_path, encoder):
    hub.add(maker.REPOSITORY, {**files, "wikipedia-en.parquet": b"unused"})
    folder = tmp_path / "files"
    record = prepare(folder, digests=digests(files))
    assert (record.rows, record.articles_by) == (len(FLAT), ("title",))
    assert sorted(hub.fetched(maker.REPOSITORY)) == sorted(files)
    with WikipediaIndex(folder, encoder) as index:
        assert index.search(FLAT[7], w=0) == [FLAT[7]]
    asked = len(hub.requests)
    prepare(folder, digests=digests(files))
    assert len(hub.requests) == asked


def test_the_published_table_may_be_removed_after_conversion(copy, files, tmp_path):
    (copy / PUBLISHED).unlink()
    os.utime(copy / INDEX)
    source = maker.write(tmp_path / "source", {INDEX: files[INDEX]})
    with pytest.raises(
        DamagedError, match=r"knn\.index was written to or copied .*prepare\.py --verify --dest \S+ hashes"
    ):
        WikipediaIndex(copy)
    (copy / f".{INDEX}.fetched.json").unlink()
    prepare(copy, source=str(source), digests=digests(files))
    assert not (copy / PUBLISHED).exists()
    WikipediaIndex(copy).close()


def test_a_file_that_differs_from_the_published_one_is_refused(hub, files, tmp_path):
    hub.add(maker.REPOSITORY, files)
    wrong = digests(files) | {INDEX: "0" * 64}
    with pytest.raises(UserError, match=r"knn\.index is not the file that was published: .*expected 0000"):
        prepare(tmp_path / "files", digests=wrong)


def test_a_download_that_was_cut_resumes(hub, files, tmp_path, monkeypatch):
    from hub_server import Fault

    hub.add(maker.REPOSITORY, files)
    path = hub.path(maker.REPOSITORY, PUBLISHED)
    hub.faults[path] = [Fault(cut_after=1000)]
    monkeypatch.setattr("openchatkit.download.retry.time.sleep", lambda seconds: None)
    assert RetryPolicy().tries > 1
    prepare(tmp_path / "files", digests=digests(files))
    assert hub.ranges(path) == [None, "bytes=1000-"]


def test_index_and_table_must_belong_together(files, tmp_path):
    files = files | {PUBLISHED: maker.parquet(TEXTS[:-1])}
    source = maker.write(tmp_path / "source", files)
    with pytest.raises(UserError, match=r"has 360 rows, wikipedia-en-sentences\.parquet 354: they do not belong"):
        prepare(tmp_path / "files", source=str(source), digests=digests(files))


def test_a_kill_while_converting_leaves_no_table_and_the_next_run_makes_it(files, tmp_path, monkeypatch):
    source = maker.write(tmp_path / "source", files)
    folder = tmp_path / "files"
    with monkeypatch.context() as patched:
        patched.setattr(wikipedia_table, "_blocks", lambda pieces: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, source=str(source), digests=digests(files))
    assert not (folder / TABLE).exists()
    with pytest.raises(DamagedError, match=r"holds no Wikipedia index: python data/wikipedia.*prepare\.py makes it"):
        WikipediaIndex(folder)
    assert prepare(folder, source=str(source), digests=digests(files)).rows == len(FLAT)


def test_stale_files_are_removed_by_the_next_run(files, tmp_path, quick_python):
    import subprocess

    source = maker.write(tmp_path / "source", files)
    code = (
        "import os, sys; from pathlib import Path; from openchatkit.retrieval.wikipedia import preparation, table; "
        "table._blocks = lambda pieces: os.kill(os.getpid(), 9); "
        f"preparation.prepare(Path(sys.argv[1]), source=sys.argv[2], digests={digests(files)!r})"
    )
    folder = tmp_path / "files"
    assert subprocess.run([quick_python, "-c", code, str(folder), str(source)], capture_output=True).returncode == -9
    assert len(list(folder.glob(f".{TABLE}.*.tmp"))) == 1
    prepare(folder, source=str(source), digests=digests(files))
    assert list(folder.glob(".*.tmp")) == []


@pytest.mark.parametrize(
    ("columns", "articles_by"),
    [((), ()), (("id",), ()), (("article_id", "id"), ("article_id",)), (("title", "id"), ("title",))],
)
def test_articles_are_separated_by_any_suitable_column(tmp_path, monkeypatch, columns, articles_by):
    monkeypatch.setattr(wikipedia_table, "_PIECE", 7)
    monkeypatch.setattr(blocks, "BLOCK", 16)
    path = maker.write(tmp_path, {PUBLISHED: maker.parquet(TEXTS, columns=columns)}) / PUBLISHED
    assert wikipedia_table.convert(path, tmp_path / TABLE) == (len(FLAT), articles_by)
    table = wikipedia_table.WikipediaTable(tmp_path / TABLE, len(FLAT))
    assert [table.text(number) for number in range(len(FLAT))] == FLAT
    for number in range(len(FLAT)):
        first = maker.LENGTH * (number // maker.LENGTH)
        expected = range(max(first, number - 2), min(first + maker.LENGTH, number + 3))
        assert table.neighbours(number, 2) == expected
    assert table.title(20) == ("Article 3" if "title" in columns else "")


def test_titles_separate_articles_of_one_snippet(tmp_path):
    """Positions that rise from one article into the next do not prove that it is one article."""
    table = pa.table(
        {"text_snippet": ["a", "b", "c", None], "position_in_source_text": [0, 5, 9, None], "title": list("xxyy")}
    )
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / PUBLISHED)
    wikipedia_table.convert(tmp_path / PUBLISHED, tmp_path / TABLE)
    read = wikipedia_table.WikipediaTable(tmp_path / TABLE, 4)
    assert [read.neighbours(number, 5) for number in range(4)] == [range(2), range(2), range(2, 3), range(3, 4)]
    assert read.text(3) == ""


def test_a_table_without_the_columns_or_no_table(tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / PUBLISHED)
    with pytest.raises(UserError, match="has no column position_in_source_text: expected it beside text"):
        wikipedia_table.convert(tmp_path / PUBLISHED, tmp_path / TABLE)
    (tmp_path / PUBLISHED).write_bytes(b"no parquet" * 10)
    with pytest.raises(UserError, match="cannot be converted"):
        wikipedia_table.convert(tmp_path / PUBLISHED, tmp_path / TABLE)


def test_a_full_disk_is_reported_before_converting(tmp_path, monkeypatch):
    path = maker.write(tmp_path, {PUBLISHED: maker.parquet(TEXTS)}) / PUBLISHED
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"wikipedia-en-sentences\.arrow: .* are needed"):
        wikipedia_table.convert(path, tmp_path / TABLE)


def test_a_snippet_is_extended_by_neighbours_of_its_article(ready, encoder):
    with WikipediaIndex(ready, encoder) as index:
        whole = index.search(FLAT[8], w=5, w_th=-1)
        assert whole == [" ".join(TEXTS[1])]
        (passage,) = index.passages(FLAT[0], w=1, w_th=-1)
        assert passage.text == f"{FLAT[0]} {FLAT[1]}"
        assert (passage.title, passage.source, passage.id) == ("Article 0", "Wikipedia", 0)
        last = index.search(FLAT[-1], w=2, w_th=-1)
        assert last == [" ".join(FLAT[-3:])]
        assert index.search(FLAT[8], w_th=1.1) == [FLAT[8]]
        assert len(index.search(FLAT[8], k=3)) == 3
        assert index.search("  ") == []


def test_missing_rows_are_dropped(ready, encoder):
    with WikipediaIndex(ready, encoder, probes=1) as index:
        found = index.passages(FLAT[8], k=len(FLAT), w=0)
        assert 0 < len(found) < len(FLAT)
        assert min(passage.id for passage in found) >= 0


@pytest.mark.parametrize(("w", "w_th"), [(5, 0.5), (1, 0.5), (3, 0.95), (20, 0.97), (0, -1), (5, -1)])
def test_search_matches_a_plain_reference(ready, encoder, w, w_th):
    vectors = encoder.encode(FLAT).astype(np.float64)
    lengths = np.sqrt((vectors**2).sum(axis=1))

    def text(row: int) -> str:
        article = row // maker.LENGTH
        taken = {-1: [], 1: []}
        for step, texts in taken.items():
            number = row + step
            while number // maker.LENGTH == article and len(texts) < w:
                if not vectors[number] @ vectors[row] / (lengths[number] * lengths[row]) > w_th:
                    break
                texts.append(FLAT[number])
                number += step
        return " ".join([*reversed(taken[-1]), FLAT[row], *taken[1]])

    with WikipediaIndex(ready, encoder) as index:
        for number in (0, 8, 200, len(FLAT) - 1):
            found = index.passages(FLAT[number], k=7, w=w, w_th=w_th)
            assert number in [passage.id for passage in found]
            assert [passage.text for passage in found] == [text(passage.id) for passage in found]
            assert index.search(FLAT[number], 7, w, w_th) == [passage.text for passage in found]


class Drawn:
    """A faiss index with given results."""

    d, ntotal = 32, len(FLAT)

    def __init__(self, rows: list[int], scores: list[float]) -> None:
        self._found = np.array([scores], np.float32), np.array([rows])

    def search(self, vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._found


def test_results_without_a_row_or_a_finite_score_are_dropped(ready, encoder):
    with WikipediaIndex(ready, encoder) as index:
        index._index = Drawn([7, 20, 7, -1, 30], [0.9, np.nan, 0.8, -np.inf, np.inf])
        assert [passage.id for passage in index.passages("bread", 5, w=0)] == [7]
        index._index = Drawn([len(FLAT)], [0.9])
        with pytest.raises(UserError, match=r"knn\.index is damaged: it names row 360; prepare it again"):
            index.search("bread")


def test_disjoint_passages_share_no_snippet(ready, encoder):
    with WikipediaIndex(ready, encoder) as index:
        index._index = Drawn([8, 9, 11, 2], [0.9, 0.8, 0.7, 0.6])
        found = index.passages("bread", 4, w=2, w_th=-1, disjoint=True)
    assert [(passage.id, passage.text) for passage in found] == [
        (8, " ".join(FLAT[6:11])),
        (11, FLAT[11]),
        (2, " ".join(FLAT[0:5])),
    ]


def test_opening_needs_no_encoder_and_no_torch(ready):
    import subprocess

    code = (
        "import sys; from openchatkit.retrieval.wikipedia.index import WikipediaIndex; "
        f"WikipediaIndex({str(ready)!r}).close(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'sentence_transformers', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_it_is_imported_as_in_the_original_kit(ready):
    import subprocess

    code = "from retrieval.wikipedia import WikipediaIndex; WikipediaIndex(sys.argv[1])"
    command = [sys.executable, "-c", f"import sys; {code}", str(ready)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_the_command_prints_what_it_finds(ready, encoder, capsys):
    with pytest.raises(SystemExit) as ended:
        wikipedia.main([FLAT[8], "--folder", str(ready), "--encoder", encoder.name, "-w", "0", "--device", "cpu"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"Article 1\n{FLAT[8]}\n\n"


def test_an_encoder_of_another_size(ready, tmp_path):
    other = Encoder(make_encoder(tmp_path / "other", plain=True, dimension=16), device="cpu")
    index = WikipediaIndex(ready, other)
    with pytest.raises(UserError, match=r"makes vectors of 16 numbers, .*vectors of 32: .*contriever-msmarco"):
        index.search("bread")


@pytest.mark.parametrize("name", [INDEX, TABLE])
def test_a_file_that_was_cut_or_altered(copy, name):
    path = copy / name
    stamp = path.stat().st_mtime_ns
    body = path.read_bytes()
    path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    os.utime(path, ns=(stamp, stamp))
    with pytest.raises(SystemExit) as ended:
        wikipedia_preparation.main(["--dest", str(copy), "--verify"])
    assert ended.value.code == 2
    path.write_bytes(body[:-1])
    with pytest.raises(DamagedError, match=rf"{name} has .* bytes, the manifest says"):
        WikipediaIndex(copy)


def test_verify_takes_the_time_stamps_of_an_intact_copy(copy, capsys):
    for name in (INDEX, TABLE):
        os.utime(copy / name)
    with pytest.raises(DamagedError, match="time stamp"):
        WikipediaIndex(copy)
    with pytest.raises(SystemExit) as ended:
        wikipedia_preparation.main(["--dest", str(copy), "--verify"])
    assert ended.value.code == 0
    WikipediaIndex(copy).close()


@pytest.mark.parametrize("lacking", ["rows", "articles_by", "time_stamps", "format"])
def test_a_manifest_that_lacks_something_is_one_line(copy, lacking):
    from openchatkit.formats import manifest

    read = manifest.read(copy)
    manifest.write(copy, read.files.values(), about={key: value for key, value in read.about.items() if key != lacking})
    with pytest.raises(DamagedError, match=r"manifest\.json is (damaged: rows|of another kind).*prepare\.py checks"):
        WikipediaIndex(copy)


def test_it_says_how_to_chat_with_it(ready, capsys):
    with pytest.raises(SystemExit):
        wikipedia_preparation.main(["--dest", str(ready)])
    assert capsys.readouterr().err.endswith(f": python inference/bot.py --retrieval {ready}\n")


def test_verify_says_that_all_is_whole(ready, capsys):
    with pytest.raises(SystemExit) as ended:
        wikipedia_preparation.main(["--dest", str(ready), "--verify"])
    assert ended.value.code == 0
    assert "is whole" in capsys.readouterr().err


def test_an_index_of_a_type_that_is_not_taken(tmp_path, encoder):
    binary = faiss.IndexLSH(32, 64)
    binary.train(np.eye(32, dtype=np.float32))
    faiss.write_index(binary, str(tmp_path / INDEX))
    with pytest.raises(UserError, match="IndexLSH"):
        wikipedia.open_index(tmp_path / INDEX)


def test_one_index_of_each_kind_that_it_may_be_is_opened(tmp_path, encoder):
    vectors = encoder.encode(FLAT)
    for factory in ("IVF4,Flat", "OPQ8,IVF4,PQ8x4", "IVF4,PQ8x4fs", "HNSW8", "PQ8x4", "Flat", "SQ8"):
        made = faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)
        made.train(vectors)
        made.add(vectors)
        faiss.write_index(made, str(tmp_path / INDEX))
        opened = wikipedia.open_index(tmp_path / INDEX)
        wikipedia._set_probes(opened, 4)
        assert 5 in opened.search(vectors[5:6], 20)[1], factory
