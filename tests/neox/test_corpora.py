"""`prepare_data.py`: a corpus from a server on this machine, from files that are there, from a host that is gone."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
from hub_server import Server, serving

from openchatkit.errors import UserError
from openchatkit.formats import token_store
from openchatkit.formats.token_store import TokenStore
from openchatkit.neox.corpora import CORPORA, Corpus, prepare
from openchatkit.paths import ROOT

TEXTS = ["A mail.", "Another one, ü."]
RECORDS = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in TEXTS).encode()
CHARACTERS = {"tokenizer": "CharLevelTokenizer"}


def documents(prefix):
    store = TokenStore(prefix)
    return [store.document(number).tolist() for number in range(store.documents)]


def test_the_19_names():
    names = (
        "enron pile_subset pile github arxiv europarl freelaw nih pubmed books1 books3 hackernews openwebtext2 "
        "stackexchange ubuntu_irc youtube_subtitles c4 c4_openwebtext enwik8"
    )
    assert list(CORPORA) == names.split()
    assert all(corpus.addresses for corpus in CORPORA.values())


def test_a_corpus_is_fetched_and_tokenised(tmp_path):
    with serving(Server) as server:
        server.files["/mails.jsonl"] = RECORDS
        corpus = Corpus("enron", (f"{server.address}/mails.jsonl",), 2)
        prefix = prepare("enron", corpus, tmp_path, **CHARACTERS)
        asked = len(server.requests)
        assert prepare("enron", corpus, tmp_path, **CHARACTERS) == prefix  # it is there already
        assert len(server.requests) == asked
        with pytest.raises(UserError, match="made by CharLevelTokenizer: -f makes it again, by HFTokenizer"):
            prepare("enron", corpus, tmp_path, tokenizer="HFTokenizer")
    assert prefix == tmp_path / "enron" / "enron_text_document"
    assert documents(prefix) == [[*text.encode(), 0] for text in TEXTS]
    assert token_store.read_maker(prefix) == {"tokenizer_type": "CharLevelTokenizer"}


def test_an_archive_of_one_text_is_one_document(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("enwik8", "<page>\n ü </page>\n")
    with serving(Server) as server:
        server.files["/enwik8.zip"] = content.getvalue()
        prefix = prepare("enwik8", Corpus("enwik8", (f"{server.address}/enwik8.zip",), 1), tmp_path, **CHARACTERS)
    assert documents(prefix) == [[*"<page>\n ü </page>\n".encode(), 0]]


def test_gpt2_files_are_fetched_for_its_tokenizer(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    (tmp_path / "enron").mkdir()
    (tmp_path / "enron" / "x.jsonl").write_text('{"text": "ab"}\n')
    with serving(Server) as server:
        server.files |= {"/vocab.json": json.dumps(vocabulary).encode(), "/merges.txt": b"#version: 0.2\na b\n"}
        addresses = {
            "gpt2-vocab.json": f"{server.address}/vocab.json",
            "gpt2-merges.txt": f"{server.address}/merges.txt",
        }
        prefix = prepare("enron", Corpus("enron"), tmp_path, tokenizer="GPT2BPETokenizer", gpt2_files=addresses)
    assert documents(prefix) == [[3, 0]]
    assert token_store.read_maker(prefix)["vocab_file"] == str(tmp_path / "gpt2-vocab.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enron", "gpt2-merges.txt", "gpt2-vocab.json"]


def test_a_host_that_is_gone(tmp_path):
    address = "http://127.0.0.1:9/data/enron_emails.jsonl.zst"
    with pytest.raises(UserError) as caught:
        prepare("enron", Corpus("enron", (address,), hub="an/other"), tmp_path, **CHARACTERS)
    expected = "put enron_emails.jsonl.zst, or any files of records with a 'text' each (as an/other of the Hugging Face"
    assert expected in str(caught.value)
    assert f"into {tmp_path}/enron and run the same command again" in str(caught.value)
    (tmp_path / "enron" / "mine.jsonl").write_bytes(RECORDS)
    prefix = prepare("enron", Corpus("enron", (address,)), tmp_path, **CHARACTERS)
    assert len(documents(prefix)) == 2


def test_files_that_were_put_there_are_enough_to_make_a_store_again(tmp_path):
    (tmp_path / "enron").mkdir()
    (tmp_path / "enron" / "mine.jsonl").write_bytes(RECORDS)
    corpus = Corpus("enron", ("http://127.0.0.1:9/mails.jsonl",))
    prepare("enron", corpus, tmp_path, **CHARACTERS)
    (tmp_path / "enron" / "mine.jsonl").write_bytes(RECORDS * 2)
    assert len(documents(prepare("enron", corpus, tmp_path, again=True, **CHARACTERS))) == 4


def test_a_part_of_a_corpus_is_not_taken_for_all_of_it(tmp_path):
    with serving(Server) as server:
        server.files["/a.jsonl"] = RECORDS
        corpus = Corpus("pile", tuple(f"{server.address}/{name}.jsonl" for name in "abc"))
        with pytest.raises(UserError, match=rf"gone, put b.jsonl into {tmp_path}/pile and run the same command again"):
            prepare("pile", corpus, tmp_path, **CHARACTERS)
        (tmp_path / "pile" / "b.jsonl").write_bytes(RECORDS)
        with pytest.raises(UserError, match=r"put c.jsonl into"):
            prepare("pile", corpus, tmp_path, **CHARACTERS)
        server.files["/c.jsonl"] = RECORDS
        assert len(documents(prepare("pile", corpus, tmp_path, **CHARACTERS))) == 6


def test_a_damaged_archive(tmp_path):
    with serving(Server) as server:
        server.files["/enwik8.zip"] = b"no archive"
        with pytest.raises(UserError, match=r"enwik8.zip is cut short or damaged .*: fetch it again"):
            prepare("enwik8", Corpus("enwik8", (f"{server.address}/enwik8.zip",)), tmp_path, **CHARACTERS)


def test_the_command_names_what_it_knows(tmp_path):
    script = str(ROOT / "neox" / "prepare_data.py")
    command = [sys.executable, script, "enrom", "-t", "CharLevelTokenizer", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no corpus 'enrom': expected one of enron, pile_subset, pile, ")
