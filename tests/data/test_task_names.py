"""`data.task_names`: the data of local names, of names that a prepare.py has fetched, and of remote ones."""

import http.server
import threading
from pathlib import Path

import pytest
from hub_server import Hub

from openchatkit import paths
from openchatkit.data import task_names
from openchatkit.data.mixture import parse
from openchatkit.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that is also the checkout, with some fetched data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name in (
        "OIG/files/unified_ni.jsonl.gz",
        "OIG/files/unified_mathqa_flanv2_kojma_cot.jsonl",
        "Mine/files/m.parquet",
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("unified_ni", "OIG/files/unified_ni.jsonl.gz"),
        ("unified_ni.jsonl", "OIG/files/unified_ni.jsonl.gz"),
        ("cot", "OIG/files/unified_mathqa_flanv2_kojma_cot.jsonl"),
        ("m", "Mine/files/m.parquet"),
    ],
)
def test_stems_of_fetched_files(here: Path, name: str, file: str) -> None:
    (part,) = parse(f"{name}:0.25", cache_dir=here)
    assert (part.files, part.weight) == ((here / "data" / file,), 0.25)


def test_a_file_of_the_working_folder_comes_first(here: Path) -> None:
    (here / "unified_ni.jsonl").touch()
    assert task_names.find_local("unified_ni.jsonl") == task_names.DataFiles(files=(Path("unified_ni.jsonl"),))


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a server with one file of records; it counts what it is asked for in `asked`."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "chats.jsonl").write_text('{"text": "hello"}\n')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_address_is_fetched_once(here: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = f"{server}/chats.jsonl"
    (part,) = parse(f"{entry}:2", cache_dir=here / "cache")
    assert (part.name, part.weight) == (entry, 2.0)
    assert part.files[0].read_text() == '{"text": "hello"}\n'
    assert part.files[0].is_relative_to(here / "cache")

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", refuse)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_HEAD", refuse)
    assert parse(entry, cache_dir=here / "cache")[0].files == part.files


def test_an_address_without_a_file(here: Path, server: str) -> None:
    with pytest.raises(UserError, match=r"--task-name: .*nothing\.jsonl.*404"):
        parse(f"{server}/nothing.jsonl", cache_dir=here / "cache")


@pytest.mark.parametrize("name", ["mine/chats.jsonl", "data/nothing", "a/b/c", "../x", "plain"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(here: Path, name: str) -> None:
    assert task_names.fetch_remote(name, here / "cache") is None


RECORDS = {
    "data/train-0.parquet": b"a",
    "data/train-1.parquet": b"b",
    "data/test-0.parquet": b"c",
    "more.jsonl.gz": b"d",
    "validation.jsonl": b"e",
    "contest.jsonl": b"f",
    "README.md": b"g",
}
FOR_TRAINING = ["contest.jsonl", "data/train-0.parquet", "data/train-1.parquet", "more.jsonl.gz"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/chats", ["contest.jsonl", "data/train-0.parquet", "data/train-1.parquet", "more.jsonl.gz"]),
        (
            "hf://datasets/some/chats",
            ["contest.jsonl", "data/train-0.parquet", "data/train-1.parquet", "more.jsonl.gz"],
        ),
        ("hf://datasets/some/chats/data/train*", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("hf://datasets/some/chats/validation.jsonl", ["validation.jsonl"]),
    ],
)
def test_a_data_set_of_the_hub(here: Path, hub: Hub, name: str, expected: list[str]) -> None:
    hub.add("datasets/some/chats", RECORDS)
    (part,) = parse(f"{name}:3", cache_dir=here / "cache")
    assert part.weight == 3.0
    place = here / "cache" / "downloads" / "hub" / "some--chats" / "files"
    assert sorted(str(path.relative_to(place)) for path in part.files) == expected
    assert [path.read_bytes() for path in part.files] == [RECORDS[str(path.relative_to(place))] for path in part.files]
    asked = len(hub.requests)
    assert parse(f"{name}:3", cache_dir=here / "cache")[0].files == part.files
    assert len(hub.requests) == asked, "what is there is not asked for again"


def test_a_data_set_that_the_hub_does_not_know(here: Path, hub: Hub) -> None:
    message = r"some/nothing is no file or folder here; as a data set of the hub: .* the hub knows no such data set"
    with pytest.raises(UserError, match=message):
        parse("some/nothing:1", cache_dir=here / "cache")
    hub.add("datasets/some/tests", {"test.jsonl": b"", "README.md": b""})
    with pytest.raises(UserError, match="some/tests holds no file"):
        parse("some/tests", cache_dir=here / "cache")


READABLE = ("a.jsonl", "b.json", "c.ndjson", "d.JSONL", "e.jsonl.bz2", "f.jsonl.xz", "g.parquet", "h.jsonl.gz")


def test_a_glob_takes_all_that_can_be_read(here: Path) -> None:
    (here / "mix").mkdir()
    for name in READABLE:
        (here / "mix" / name).touch()
    found = task_names.find_local("mix/*")
    assert found == task_names.DataFiles(files=tuple(Path("mix") / name for name in READABLE))


def test_a_glob_that_also_matches_other_files_names_them(here: Path) -> None:
    (here / "mix").mkdir()
    for name in (*READABLE, "README.md", "z.csv"):
        (here / "mix" / name).touch()
    message = r"mix/\* also matches what cannot be read, mix/README\.md, mix/z\.csv: name the files, or give a pattern"
    with pytest.raises(UserError, match=message):
        task_names.find_local("mix/*")


def test_a_glob_over_saved_datasets_and_stores(here: Path) -> None:
    (here / "mix" / "saved").mkdir(parents=True)
    (here / "mix" / "saved" / "dataset_info.json").touch()
    (here / "mix" / "a.jsonl").touch()
    assert task_names.find_local("mix/*") == task_names.DataFiles(files=(Path("mix/a.jsonl"), Path("mix/saved")))
    assert task_names.find_local("mix/**") == task_names.DataFiles(files=(Path("mix/a.jsonl"), Path("mix/saved")))
    (here / "stores").mkdir()
    for name in ("s.bin", "s.idx", "s.mask.bin"):
        (here / "stores" / name).touch()
    assert task_names.find_local("stores/*") == task_names.DataFiles(stores=(Path("stores/s"),))
