"""The command `retrieval/build_index.py` (`command`, `report`): its output and exit status."""

import json
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_encoder import make_encoder

from openchatkit.paths import ROOT
from openchatkit.retrieval import command

SCRIPT = ROOT / "retrieval" / "build_index.py"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("encoders") / "tiny"))


@pytest.fixture(scope="module")
def run(quick_python: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a process."""

    def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [quick_python, SCRIPT, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    return run_command


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, encoder: str, run: Callable) -> Path:
    folder = tmp_path_factory.mktemp("index")
    (folder / "docs").mkdir()
    (folder / "docs" / "castle.md").write_text("# Castle\n\nthe old king and queen\n", encoding="utf-8")
    (folder / "docs" / "sea.txt").write_text("ship and sail", encoding="utf-8")
    (folder / "docs" / "none.bin").write_bytes(b"x")
    result = run("build", folder / "docs", "--index", folder / "index", "--encoder", encoder, "--device", "cpu")
    assert (result.returncode, result.stdout) == (0, "")
    assert f"left out, in part or whole:\n  {folder}/docs/none.bin: of no kind that is read\n" in result.stderr
    return folder / "index"


@pytest.fixture
def gpus(monkeypatch):
    from fake_gpus import FakeGpus

    return FakeGpus(monkeypatch)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, in this process."""
    with pytest.raises(SystemExit) as ended:
        command.main([str(each) for each in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.mark.parametrize(
    ("subcommand", "flags", "copied"),
    [
        ("search", (), False),
        ("search", ("--device", "cuda"), True),
        ("search", ("--device", "cpu"), False),
        ("evaluate", (), True),
        ("evaluate", ("--device", "cpu"), False),
    ],
)
def test_gpus_search_where_faiss_has_them(capsys, monkeypatch, tmp_path, encoder, gpus, subcommand, flags, copied):
    monkeypatch.setattr("openchatkit.retrieval.dense.MAX_FLAT", 1)
    (tmp_path / "docs.jsonl").write_text('{"text": "the old king and queen"}\n{"text": "ship and sail"}\n')
    options = ("--index", tmp_path / "index", "--encoder", encoder, "--device", "cpu")
    assert call(capsys, "build", tmp_path / "docs.jsonl", *options)[0] == 0
    (tmp_path / "asked.jsonl").write_text('{"query": "old king", "text": "king"}\n')
    what = ("old king",) if subcommand == "search" else ("--queries", tmp_path / "asked.jsonl")
    monkeypatch.setattr("openchatkit.retrieval.encoder.device_name", lambda device: "cpu")  # none is here
    status, out, _ = call(capsys, subcommand, *what, "--index", tmp_path / "index", "--json", *flags)
    assert (status, bool(gpus.searches)) == (0, copied)
    if subcommand == "search":
        assert json.loads(out)[0]["text"] == "the old king and queen"


def test_a_search_prints_scores_and_places(capsys, index):
    status, out, _ = call(capsys, "search", "old king", "--index", index)
    assert status == 0
    assert "castle.md,line3" in "".join(out.split())  # a long path is folded, not cut
    assert "the old king and queen" in out
    assert "\x1b[" not in out
    status, out, _ = call(capsys, "search", "old king", "--index", index, "--json", "-k", 1)
    [hit] = json.loads(out)
    assert (hit["title"], hit["place"], hit["text"]) == ("Castle", "line 3", "the old king and queen")
    assert hit["dense"] > 0.5
    assert hit["sparse"] > 0


def test_a_search_names_the_other_places_of_a_text(capsys, tmp_path):
    for at in range(6):
        (tmp_path / f"{at}.txt").write_text("the old king and queen")
    assert call(capsys, "build", tmp_path, "--index", tmp_path / "index", "--encoder", "none")[0] == 0
    out = call(capsys, "search", "old king", "--index", tmp_path / "index", "--json")[1]
    [hit] = json.loads(out)
    assert [Path(place).name for place in hit["also"]] == [f"{at}.txt, line 1" for at in range(1, 6)]
    out = call(capsys, "search", "old king", "--index", tmp_path / "index")[1]
    assert "also" in out
    assert "and2more" in "".join(out.split())


def test_colours_are_only_for_a_terminal(index, quick_python):
    outer, inner = pty.openpty()
    with open(outer, "rb", buffering=0) as terminal:
        subprocess.run([quick_python, SCRIPT, "search", "old king", "--index", index], stdout=inner, check=True)
        assert b"\x1b[" in terminal.read(4096)


def test_a_search_without_hits_says_so_on_stderr(capsys, index):
    status, out, err = call(capsys, "search", "hello", "--index", index, "--mode", "sparse")
    assert (status, out) == (0, "")
    assert "nothing in the index is about that" in err
    status, out, _ = call(capsys, "search", "hello", "--index", index, "--no-floor", "--json")
    assert len(json.loads(out)) == 2


def test_info(capsys, index):
    status, out, _ = call(capsys, "info", "--index", index, "--verify", "--sources", "--skipped", "--json")
    about = json.loads(out)
    assert status == 0
    assert (about["rows"], about["verified"], about["encoder"]["dimension"]) == (2, True, 32)
    assert [Path(each["source"]).name for each in about["sources"]] == ["castle.md", "sea.txt"]
    assert [each["reason"] for each in about["skipped"]] == ["of no kind that is read"]
    _, out, _ = call(capsys, "info", "--index", index, "--sources", "--skipped")
    assert "castle.md: 1 passages" in " ".join(out.split())
    assert "dimension 32" in out


def test_an_index_is_changed(capsys, index, tmp_path):
    (tmp_path / "new.txt").write_text("white snow", encoding="utf-8")
    assert call(capsys, "add", tmp_path / "new.txt", "--index", index, "--device", "cpu")[0] == 0
    assert call(capsys, "update", "--index", index)[0] == 0
    assert "white snow" in call(capsys, "search", "white snow", "--index", index)[1]
    assert call(capsys, "delete", tmp_path / "new.txt", "--index", index)[0] == 0
    assert "white snow" not in call(capsys, "search", "white snow", "--index", index)[1]


def test_an_evaluation_of_questions(capsys, index, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "old king", "source": "castle.md"}\n{"query": "sail ship", "source": "sea.txt"}\n')
    status, out, _ = call(capsys, "evaluate", "--index", index, "--queries", path)
    assert status == 0
    assert "2 questions, 2 passages" in out
    assert "| fused | 100.0 | 100.0 | 100.0 | 1.000 | 1.000 |" in out
    _, out, _ = call(capsys, "evaluate", "--index", index, "--queries", path, "--json", "--device", "cpu")
    assert json.loads(out)["BM25"]["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0}


def test_an_evaluation_of_a_set(capsys, encoder, tmp_path, monkeypatch):
    from openchatkit.retrieval import question_sets

    code = 'def f{0}():\n    """Find the {0}.\n\n    It is a {0} of {0}.\n    """\n'
    (tmp_path / "lib.py").write_text("".join(code.format(word) for word in ("apple", "moon", "fox")))
    docstrings = question_sets.stdlib
    monkeypatch.setattr(question_sets, "stdlib", lambda: docstrings(tmp_path))
    flags = ("--index", tmp_path / "set", "--encoder", encoder, "--questions", 2)
    status, out, _ = call(capsys, "evaluate", "--set", "stdlib", *flags)
    assert status == 0
    assert "2 questions, 3 passages" in out
    assert "| BM25 | 100.0 |" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "x", "--index", "nowhere"], "nowhere is not a folder: expected a retrieval index"),
        (["search", "x"], "the following arguments are required: --index"),
        (["search", "x", "--index", "i", "-k", "0"], "expected a whole number of at least 1"),
        (["evaluate", "--index", "i"], "one of the arguments --queries --set is required"),
        (["evaluate", "--index", "i", "--set", "awscli"], "--set awscli: expected `awscli WHEEL` or `stdlib`"),
        (["evaluate", "--index", "i", "--queries", "q", "--encoder", "e"], "--encoder goes with --set"),
        (["build", "nowhere", "--index", "i", "--encoder", "none"], "nowhere: no such file or folder"),
        (["build", ".", "--index", "i", "--encoder", "./none"], "no such folder"),
        (["build", ".", "--index", "i", "--encoder", "none", "--overlap", "150"], "expected at most half of"),
    ],
)
def test_user_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "i").exists()


def test_unprintable_characters_of_file_names_are_escaped(tmp_path, run):
    (tmp_path / "docs").mkdir()
    for name in (b"a.txt", b"red\x1b[31m.txt", b"two\nlines.txt", b"caf\xe9.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path / "docs") + b"/" + name)).write_text("text", encoding="utf-8")
    made = run("build", tmp_path / "docs", "--index", tmp_path / "index", "--encoder", "none")
    assert made.returncode == 0
    shown = run("info", "--index", tmp_path / "index", "--skipped")
    for text in (made.stderr, shown.stdout):
        for name in ("red\\x1b[31m.txt", "two\\nlines.txt", "caf\\udce9.txt"):
            assert f"docs/{name}:itsnamecannotbeshown" in "".join(text.split())
    skipped = json.loads(run("info", "--index", tmp_path / "index", "--skipped", "--json").stdout)["skipped"]
    assert [os.fsencode(Path(each["source"]).name) for each in skipped] == [
        b"caf\xe9.txt",
        b"red\x1b[31m.txt",
        b"two\nlines.txt",
    ]
