"""The chat with an index: from flags to citations, through pipes, as JSON, in batches, on a terminal."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.formats import wikipedia_index
from openchatkit.inference.responder import Reply
from openchatkit.inference.retrieval.retriever import WikipediaSearcher
from openchatkit.inference.shell.output import Output
from openchatkit.paths import ROOT
from openchatkit.retrieval.building import operations
from openchatkit.retrieval.index import Index
from openchatkit.retrieval.passage import Passage
from openchatkit.retrieval.rerank import Reranker

sys.path.insert(0, str(ROOT / "tests" / "retrieval"))
try:
    import wikipedia_maker as maker
    from tiny_encoder import make_cross_encoder, make_encoder
finally:
    sys.path.pop(0)

FLAGS = ("--no-sample", "--no-date", "--max-tokens", "20")
NOTES = {
    "lamp.txt": "The lighthouse keeper lights the lamp every evening.\n",
    "bread.txt": "Sourdough bread rises overnight in a cool kitchen.\n",
    "tea.txt": "A kettle boils water for tea within three minutes.\n",
}


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> Path:
    """An index of three files, searched by words."""
    folder = tmp_path_factory.mktemp("notes")
    for name, text in NOTES.items():
        (folder / name).write_text(text, encoding="utf-8")
    operations.build([folder], folder.parent / "index", encoder=operations.NO_ENCODER)
    return folder.parent / "index"


@pytest.fixture
def own(notes, tmp_path) -> Path:
    """The same, for a test to spoil."""
    return Path(shutil.copytree(notes, tmp_path / "index"))


def test_a_pipe_has_replies_alone_and_json_their_sources(piped, trained_model, notes):
    script = "When does bread rise overnight?\nhello\n/retrieval off\nWhen does bread rise overnight?\n"
    plain = piped(script, trained_model, *FLAGS, "--retrieval", str(notes))
    assert "[1]" not in plain.stdout.decode()
    assert (plain.notes, plain.status) == ([], 0)
    told = [
        json.loads(line) for line in piped(script, trained_model, *FLAGS, "--retrieval", str(notes), "--json").lines
    ]
    (source,) = told[0]["sources"]
    assert source["number"] == 1
    assert source["source"].endswith("bread.txt")
    assert source["text"] == NOTES["bread.txt"].strip()
    assert [source["text"] in passage for passage in told[0]["passages"]] == [True]
    assert (told[1]["sources"], told[1]["passages"]) == ([], [])
    assert "sources" not in told[2]


def test_sources_are_printed_when_asked_for(piped, trained_model, notes):
    script = "/sources\nWhen does bread rise overnight?\n/sources\n/passage red\nsay it\n/sources\n/retrieval\n"
    lines = piped(script, trained_model, *FLAGS, "--retrieval", str(notes)).lines
    assert lines[0] == "no reply yet"
    (at,) = [number for number, line in enumerate(lines) if line.startswith("[1] ") and "bread.txt (score " in line]
    assert lines[at + 1] == f"    {NOTES['bread.txt'].strip()}"
    assert lines[-3:] == ["[1] given with the question", "    red", "retrieval: on"]


@pytest.mark.parametrize("k", [1, 2])
def test_k_is_the_most_that_is_found(random_models, piped, notes, k):
    question = "Is sourdough bread better than tea of the kettle?\n"
    flags = ("--retrieval", str(notes), "--retrieval-k", str(k))
    done = piped(question, random_models["neox"], *FLAGS, "--json", *flags)
    assert len(json.loads(done.stdout)["sources"]) == k


def test_a_reranker_decides_which_passage_comes_first(piped, random_models, notes, tmp_path):
    question = "Is sourdough bread better than tea of the kettle?"
    reranker = str(make_cross_encoder(tmp_path / "cross"))
    flags = ("--json", "--retrieval", str(notes), "--retrieval-k", "1")
    (found,) = json.loads(
        piped(f"{question}\n", random_models["neox"], *FLAGS, *flags, "--retrieval-reranker", reranker).stdout
    )["sources"]
    with Index.open(notes) as index:
        (best,) = Reranker(reranker).rerank(question, index.search(question, 2), 1)
    assert (found["text"], found["score"]) == (best.text, round(best.score, 4))
    done = piped(f"{question}\n", random_models["neox"], *FLAGS, *flags, "--retrieval-reranker", str(notes))
    assert done.status == 2
    assert done.notes[-1].startswith(f"error: {notes} ")


def test_rows_of_a_batch_carry_their_sources(piped, trained_model, notes, tmp_path):
    rows = [{"prompt": "When does bread rise overnight?"}, {"prompt": "say it", "passages": ["red"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert piped("", trained_model, *FLAGS, *files, "--retrieval", str(notes)).status == 0
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["sources"][0]["source"].endswith("bread.txt")
    assert (second["reply"], [source["text"] for source in second["sources"]]) == ("日本 red", ["red"])
    other = piped("", trained_model, *FLAGS, *files)
    assert other.notes[0].startswith("error: line 1 of ")


def test_a_batch_goes_on_with_the_index_that_it_began_with_wherever_that_lies(piped, random_models, notes, tmp_path):
    rows = [{"prompt": "When does bread rise overnight?"}, {"prompt": "Where is the kettle?"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    command = (random_models["neox"], *FLAGS, "--batch", str(tmp_path / "in.jsonl"), "--output", str(out))
    assert piped("", *command, "--retrieval", str(notes)).status == 0
    whole = out.read_bytes()
    out.write_bytes(whole.splitlines(keepends=True)[0])
    shutil.copytree(notes, tmp_path / "moved")
    assert piped("", *command, "--retrieval", str(tmp_path / "moved")).status == 0
    assert [json.loads(line)["sources"] for line in out.read_bytes().splitlines()] == [
        json.loads(line)["sources"] for line in whole.splitlines()
    ]
    out.write_bytes(one := whole.splitlines(keepends=True)[0])
    (tmp_path / "more.txt").write_text("A kettle stands in the harbour.\n")
    operations.add([tmp_path / "more.txt"], tmp_path / "moved")
    done = piped("", *command, "--retrieval", str(tmp_path / "moved"))
    assert done.notes[0].startswith(f"error: line 1 of {out} is not a reply to this input with these settings: ")
    assert (done.status, out.read_bytes()) == (2, one)


@pytest.mark.parametrize(("batch", "found"), [(False, [0, 1]), (True, [0, 0])])
def test_a_chat_takes_up_what_is_added_while_it_runs_and_a_batch_does_not(
    piped, random_models, own, tmp_path, monkeypatch, batch, found
):
    question, text = "How many strings has a violin?", "A violin has four strings."
    search = Index.search

    def adding(self: Index, query: str, k: int) -> list[Passage]:
        hits = search(self, query, k)
        (tmp_path / "violin.txt").write_text(text)
        operations.add([tmp_path / "violin.txt"], own)
        return hits

    monkeypatch.setattr(Index, "search", adding)
    command = (random_models["neox"], *FLAGS, "--retrieval", str(own))
    if batch:
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": question}) + "\n" + json.dumps({"prompt": question}))
        out = tmp_path / "out.jsonl"
        piped("", *command, "--batch", str(tmp_path / "in.jsonl"), "--output", str(out))
        lines = out.read_text().splitlines()
    else:
        lines = piped(f"{question}\n" * 2, *command, "--json").lines
    sources = [[source["text"] for source in json.loads(line)["sources"]] for line in lines]
    assert sources == [[text] * count for count in found]


def test_an_empty_path_is_not_wikipedia(piped):
    (note,) = piped("", "/no/such/model", "--retrieval", "").notes
    assert note == "error: . has no manifest.json: expected a retrieval index, as retrieval/build_index.py makes"


def test_a_batch_without_its_index_is_one_line(piped, trained_model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    files = ("--batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    done = piped("", "/no/such/model", *files, "--retrieval", str(tmp_path / "none"))
    assert done.notes == [
        f"error: {tmp_path / 'none'} is not a folder: expected a retrieval index, as retrieval/build_index.py makes"
    ]
    assert (done.status, (tmp_path / "out.jsonl").exists()) == (2, False)


def test_what_would_be_sent_is_shown_with_its_passages(piped, trained_model, notes):
    shown = piped("/raw_prompt When does bread rise overnight?\n", trained_model, *FLAGS, "--retrieval", str(notes))
    assert f"> {NOTES['bread.txt']}" in shown.stdout.decode().replace("bread: ", "")


def test_a_damaged_index_is_refused_before_the_model_is_loaded(piped, own):
    path = next(own.glob("table-*"))
    path.write_bytes(path.read_bytes()[:-1])
    done = piped("", "/no/such/model", "--retrieval", str(own))
    assert done.status == 2
    assert done.notes[0].startswith(f"error: {path} has ")


def test_without_wikipedia_one_line_says_what_makes_it(piped, monkeypatch, tmp_path):
    monkeypatch.setattr(wikipedia_index, "FOLDER", tmp_path / "files")
    done = piped("", "/no/such/model", "--retrieval")
    command = "python data/wikipedia-3sentence-level-retrieval-index/prepare.py"
    expected = f"error: {tmp_path / 'files'} holds no Wikipedia index: {command} makes it (14 GB to fetch)"
    assert (done.notes, done.status) == ([expected], 2)


def test_an_encoder_that_has_moved(piped, random_models, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "lamp.txt").write_text(NOTES["lamp.txt"])
    encoder = make_encoder(tmp_path / "encoder", plain=False)
    operations.build([tmp_path / "notes"], tmp_path / "index", encoder=str(encoder))
    moved = encoder.rename(tmp_path / "moved")
    command = (random_models["neox"], *FLAGS, "--json", "--retrieval", str(tmp_path / "index"))
    lost = piped("", "/no/such/model", *command[1:])
    assert lost.status == 2
    (note,) = lost.notes
    assert note.startswith(f"error: no encoder for {tmp_path / 'index'}: {encoder}: no such folder")
    assert note.endswith("(--retrieval-encoder NAME takes it from elsewhere)")
    found = piped("Who lights the lamp?\n", *command, "--retrieval-encoder", str(moved))
    assert [source["text"] for source in json.loads(found.stdout)["sources"]] == [NOTES["lamp.txt"].strip()]
    other = make_encoder(tmp_path / "other", plain=False, dimension=16)
    (note,) = piped("", *command, "--retrieval-encoder", str(other)).notes
    assert "is not the one that" in note


# -- Wikipedia


class Snippets:
    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def passages(self, query: str, k: int, *, w: int, disjoint: bool) -> list[Passage]:
        assert (w, disjoint) == (2, True)
        return [Passage(text, "Penicillin", "Wikipedia") for text in self._texts[:k]]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("Who discovered penicillins?", 2),
        ("Which moulds grow on bread?", 1),
        ("Are submarines built of wood?", 0),
        ("hello", 0),
    ],
)
def test_what_has_no_word_of_the_question_does_not_count(query, found):
    searcher = WikipediaSearcher(Snippets("It is an antibiotic.", "A mould on bread made it."))
    assert len(searcher.search(query, 3)) == found


def test_wikipedia_is_looked_up_in_a_chat(piped, random_models, tmp_path, monkeypatch):
    import hashlib

    from openchatkit.retrieval.encoder import Encoder
    from openchatkit.retrieval.wikipedia import index as wikipedia
    from openchatkit.retrieval.wikipedia.preparation import prepare

    folder = make_encoder(tmp_path / "contriever", plain=True)
    texts = maker.snippets()
    vectors = Encoder(folder, device="cpu").encode([text for article in texts for text in article])
    files = maker.published(texts, vectors, columns=["title"])
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    prepare(tmp_path / "files", source=str(maker.write(tmp_path / "source", files)), digests=digests)
    monkeypatch.setattr(wikipedia, "ENCODER", str(folder))
    monkeypatch.setattr(wikipedia_index, "FOLDER", tmp_path / "files")
    question = " ".join(texts[3][0].split()[:4])
    named = ("--retrieval", str(tmp_path / "files"), "--retrieval-encoder", str(folder))
    for flags in (("--retrieval",), named):
        done = piped(f"{question}\n", random_models["neox"], *FLAGS, "--json", *flags)
        source = json.loads(done.stdout)["sources"][0]
        assert (source["source"], source["title"][:8]) == ("Wikipedia", "Article ")


# -- on a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("citations", "expected"), [(True, 1), (False, 0)])
def test_a_terminal_shows_the_sources_that_were_found(monkeypatch, citations, expected):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stderr = Terminal()
    output = Output(Terminal(), stderr, interactive=True, citations=citations)
    found = Passage("text", "A title\x1b[31m", "notes/bread.txt", "lines 1-2", 0.5, 1)
    reply = Reply("bread", (), "end", passages=("given", "text"), sources=(Passage("given"), found), note="one\nline")
    with output.replying("question", max_tokens=5) as printer:
        printer.reply = reply
    lines = stderr.getvalue().splitlines()
    assert [line for line in lines if "[2]" in line] == [
        "\x1b[2m[2] A title\\x1b[31m, lines 1-2, notes/bread.txt\x1b[0m"
    ] * expected
    assert [line for line in lines if "[1]" in line] == []
    assert "\x1b[2mnote: one line\x1b[0m" in lines


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_citations_follow_the_reply_in_the_real_shell(trained_model, notes, quick_python):
    import pexpect

    command = [str(ROOT / "inference" / "bot.py"), "--model", str(trained_model), *FLAGS, "--retrieval", str(notes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "INPUTRC": "/dev/null"}
    shell = pexpect.spawn(
        str(quick_python), command, env=environment, encoding="utf-8", dimensions=(40, 300), timeout=60
    )
    try:
        shell.expect_exact(">>> ")
        shell.send("When does bread rise overnight?\r")
        shell.expect(r"\[1\] .*bread\.txt\r\n")
        shell.expect_exact(">>> ")
        shell.send("/sou\t\r")
        shell.expect(r"\[1\] .*bread\.txt \(score ")
        shell.expect_exact(">>> ")
    finally:
        shell.close(force=True)


def test_an_index_without_a_search_is_no_error_message_of_python(piped, trained_model, notes, monkeypatch):
    from openchatkit.retrieval.index import Index

    def fail(self, query, k):
        raise UserError("the index was made anew\nunder us")

    monkeypatch.setattr(Index, "search", fail)
    done = piped("say it\n", trained_model, *FLAGS, "--retrieval", str(notes))
    assert done.lines == ["日本 nothing"]
    assert done.notes == ["note: no passages were looked up: the index was made anew under us"]
    assert done.status == 0


def test_a_batch_tells_how_many_rows_were_answered_without_looking_up(
    piped, trained_model, notes, monkeypatch, tmp_path
):
    from openchatkit.retrieval.index import Index

    def fail(self, query, k):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Index, "search", fail)
    (tmp_path / "in.jsonl").write_text('{"prompt": "say it"}\n{"prompt": "hello"}\n')
    files = ("--batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    for _ in range(2):
        done = piped("", trained_model, *FLAGS, *files, "--retrieval", str(notes))
        told = 'for 1 of 2 rows passages are missing: see "note" in their lines'
        assert (done.notes[-1], done.status) == (told, 0)


def test_a_title_cannot_hide_its_source(piped, random_models, monkeypatch, notes):
    from openchatkit.retrieval.index import Index

    found = Passage("a text\x1b]0;t\x07", "title\x1b]0;gone ", "notes/bread.txt", "line\n2", 0.5, 1)
    monkeypatch.setattr(Index, "search", lambda self, query, k: [found])
    done = piped("Which bread rises?\n/sources\n", random_models["neox"], *FLAGS, "--retrieval", str(notes))
    assert done.lines[-2:] == ["[1] title\\x1b]0;gone, line 2, notes/bread.txt (score 0.5)", "    a text"]
