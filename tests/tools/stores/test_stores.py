"""`tools/stores.py`: counts, a merged store against one built of all inputs, and damage by its first place."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from openchatkit.formats import token_store
from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.formats.token_store import TokenStore, bin_path, idx_path, mask_path
from openchatkit.storage import own_folder
from openchatkit.tools.preprocess.command import main as preprocess
from openchatkit.tools.stores import examination, merging
from openchatkit.tools.stores.command import main

DOCUMENTS = [[5, 6, 7], [300], [0, 1, 2, 3]]


def run(*argv: object, command: object = main) -> int:
    with pytest.raises(SystemExit) as ended:
        command([str(argument) for argument in argv])
    return ended.value.code


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, *, dtype: str = "<u2", masked: bool = False) -> Path:
    """A store of documents; the mask is 1 on even tokens."""
    with TokenStoreWriter(prefix, dtype=np.dtype(dtype), masked=masked) as writer:
        for document in map(np.array, documents):
            writer.add(document, np.array([len(document)]), document % 2 == 0 if masked else None)
    return prefix


def build(prefix: Path, texts: list[str], *flags: object) -> Path:
    """A store by tools/preprocess_data.py."""
    data = prefix.with_suffix(".jsonl")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    kind = ("--tokenizer-type", "CharLevelTokenizer", "--append-eod")
    assert run("--input", data, *kind, *flags, "--output-prefix", prefix, command=preprocess) == 0
    return prefix.with_name(f"{prefix.name}_text_document")


def files(prefix: Path) -> dict[str, bytes]:
    found = {place.__name__: place(prefix) for place in (idx_path, bin_path, mask_path)}
    return {name: path.read_bytes() for name, path in found.items() if path.exists()}


def test_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stores = [write(tmp_path / "a"), write(tmp_path / "bb", masked=True)]
    stores.append(write(tmp_path / "labels", [[-100, 6, 7], [-100], [0, 1, 2, 3]], dtype="<i4"))
    assert run("count", *stores, bin_path(stores[0])) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["store", "documents", "tokens", "trained", "type"],
        [str(stores[0]), "3", "8", "-", "uint16"],
        [str(stores[1]), "3", "8", "4", "uint16"],
        [str(stores[2]), "3", "8", "6", "int32"],
        ["all", "9", "24", "10", "uint16,", "int32"],
    ]


CHATS = [f"<human>: {n}?\n<bot>: It is {n}.\n" for n in range(9)]


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("flags", [(), ("--loss-mask",), ("--mask-before-token", ord(":"))])
def test_a_merged_store_is_one_built_of_all_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, flags: tuple[object, ...]
) -> None:
    monkeypatch.setattr(merging, "_PIECE", piece)
    monkeypatch.setattr(examination, "_PIECE", piece)
    parts = [CHATS[:4], CHATS[4:5], CHATS[5:]]
    stores = [build(tmp_path / f"part{number}", part, *flags) for number, part in enumerate(parts)]
    whole = build(tmp_path / "whole", CHATS, *flags)
    for key in ("text", "label") if "--mask-before-token" in flags else ("text",):
        named = [prefix.with_name(prefix.name.replace("text", key)) for prefix in stores]
        assert run("merge", *named, "--output-prefix", tmp_path / "new" / key) == 0
        assert files(tmp_path / "new" / key) == files(whole.with_name(f"whole_{key}_document"))
    assert len(files(tmp_path / "new" / "text")) == (3 if "--loss-mask" in flags else 2)
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]


def test_documents_without_tokens(tmp_path: Path) -> None:
    documents = [[], [1, 2], [], [3], []]
    stores = [write(tmp_path / "a", documents), write(tmp_path / "none", []), write(tmp_path / "b", documents)]
    assert run("merge", *stores, "--output-prefix", tmp_path / "new") == 0
    assert files(tmp_path / "new") == files(write(tmp_path / "whole", [*documents, *documents]))


def test_a_store_without_a_mask_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stores = [write(tmp_path / "a", masked=True), write(tmp_path / "b")]
    assert run("merge", *stores, "--output-prefix", tmp_path / "new") == 0
    assert f"{tmp_path}/b has no mask: nothing of it is marked as trained on" in capsys.readouterr().err
    assert TokenStore(tmp_path / "new").mask.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, *[0] * 8]


def test_the_tokenizer_is_merged_as_far_as_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stores = [write(tmp_path / name) for name in ("a", "b", "c")]
    (tmp_path / "v1").write_text("words")
    (tmp_path / "v2").write_text("words")
    for store, vocabulary in zip(stores, ("v1", "v2"), strict=False):
        maker = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / vocabulary)}
        token_store.write_maker(store, maker)
    assert run("merge", *stores[:2], "--output-prefix", tmp_path / "new") == 0
    assert token_store.read_maker(tmp_path / "new") == token_store.read_maker(stores[0])
    assert token_store.find_prefix(tmp_path / "new.tokenizer") == tmp_path / "new"
    assert token_store.find_prefix(tmp_path / "new.mask.bin") == tmp_path / "new"
    assert run("merge", *stores, "--output-prefix", tmp_path / "new", "--overwrite") == 0
    assert token_store.read_maker(tmp_path / "new") == {}
    (tmp_path / "v2").write_text("other words")
    capsys.readouterr()
    assert run("merge", *stores, "--output-prefix", tmp_path / "other") == 2
    assert f"{tmp_path}/b was made by HFTokenizer {tmp_path}/v2 and {tmp_path}/a by" in capsys.readouterr().err
    assert not token_store.find_prefix(tmp_path / "other")


def test_a_merge_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stores = [write(tmp_path / "a"), write(tmp_path / "b")]
    before = files(write(tmp_path / "new", [[9]]))
    with monkeypatch.context() as full:
        full.setattr(TokenStoreWriter, "add", raise_full_disk)
        assert run("merge", *stores, "--output-prefix", tmp_path / "new", "--overwrite") == 2
    assert "the disk is full" in capsys.readouterr().err
    with own_folder(tmp_path / ".new.merging"):
        assert run("merge", *stores, "--output-prefix", tmp_path / "new", "--overwrite") == 2
    assert "another process is writing" in capsys.readouterr().err
    assert files(tmp_path / "new") == before
    assert run("merge", *stores, "--output-prefix", tmp_path / "new", "--overwrite") == 0
    assert TokenStore(tmp_path / "new").documents == 6


def raise_full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["count", "{tmp}/none"], "there is no token store {tmp}/none: expected {tmp}/none.idx and its .bin"),
        (["merge", "{tmp}/a", "--output-prefix", "{tmp}/new"], "merge takes two stores or more: found {tmp}/a alone"),
        (["merge", "{tmp}/a", "{tmp}/b", "--output-prefix", "{tmp}/c"], "{tmp}/c.idx is there already: name another"),
        (
            ["merge", "{tmp}/a", "{tmp}/b", "--output-prefix", "{tmp}/b", "--overwrite"],
            "--output-prefix {tmp}/b is one of the stores to merge",
        ),
        (["merge", "{tmp}/a", "{tmp}/wide", "--output-prefix", "{tmp}/new"], "{tmp}/wide is int32 and {tmp}/a uint16"),
        (
            ["merge", "{tmp}/a", "{tmp}/damaged", "--output-prefix", "{tmp}/new"],
            "{tmp}/damaged.idx: document 1 begins at byte 7, expected 6: make the store again",
        ),
        (["check", "{tmp}/a", "{tmp}/b", "--labels", "{tmp}/wide"], "--labels {tmp}/wide belong to one store"),
        (["check", "{tmp}/a", "--labels", "{tmp}/none"], "there is no token store {tmp}/none"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    for name in ("a", "b", "c", "damaged"):
        write(tmp_path / name)
    write(tmp_path / "wide", dtype="<i4")
    change(idx_path(tmp_path / "damaged"), PLACES + 8, "<q", 7)
    before = sorted(tmp_path.iterdir())
    assert run(*(argument.format(tmp=tmp_path) for argument in argv)) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


SIZES, PLACES = 34, 34 + 3 * 4  # where they begin in an index of three documents


def change(path: Path, at: int, form: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, value)
    path.write_bytes(content)


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(
    ("place", "at", "form", "value", "message"),
    [
        (idx_path, SIZES, "<i", -1, "s.idx: document 0 has -1 tokens"),
        (idx_path, SIZES, "<i", 4, "s.idx: document 1 begins at byte 6, expected 8"),
        (idx_path, PLACES + 8, "<q", 2, "s.idx: document 1 begins at byte 2, expected 6"),
        (idx_path, 0, "<B", 0, "s.idx is no token index"),
        (idx_path, SIZES + 8, "<i", 9, "s.bin holds 16 bytes where 26 belong"),
        (bin_path, 2 * 6, "<H", 301, "s.bin: token 2 of document 2 is 301, and the vocabulary has 301"),
        (mask_path, 4, "<B", 3, "s.mask.bin: token 0 of document 2 is marked 3"),
    ],
)
def test_the_first_damage_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    place: object,
    at: int,
    form: str,
    value: int,
    message: str,
) -> None:
    monkeypatch.setattr(examination, "_PIECE", piece)
    prefix = write(tmp_path / "s", masked=True)
    assert run("check", prefix, "--vocab-size", 301) == 0
    assert capsys.readouterr().out == f"{prefix}: whole, 3 documents, 8 tokens\n"
    change(place(prefix), at, form, value)
    other = write(tmp_path / "other")
    assert run("check", prefix, other, "--vocab-size", 301) == 1
    damaged, whole = capsys.readouterr().out.splitlines()
    assert damaged.startswith(f"{prefix}: DAMAGED: {tmp_path}/{message}")
    assert whole == f"{other}: whole, 3 documents, 8 tokens"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[-100, 6, 7], [-100], [0, 1, 2, 3]], None),
        ([[-100, 6, 7], [-100]], "it holds 2 documents and the texts 3"),
        ([[-100, 6], [7, -100], [0, 1, 2, 3]], "out of step with {prefix}: document 0 has 3 tokens and 2 labels"),
        ([[-100, 6, 7], [-100], [0, 1, 9, 3]], "token 2 of document 2 is 2, its label 9"),
        ([[-100, 6, 7], [-99], [0, 1, 2, 3]], "labels.bin: token 0 of document 1 is -99"),
    ],
)
def test_labels_in_step(
    tmp_path: Path, capsys: pytest.CaptureFixture, labels: list[list[int]], message: str | None
) -> None:
    prefix, beside = write(tmp_path / "s", dtype="<i4"), write(tmp_path / "labels", labels, dtype="<i4")
    assert run("check", prefix, "--labels", beside) == (0 if message is None else 1)
    texts, found = capsys.readouterr().out.splitlines()
    assert texts.startswith(f"{prefix}: whole")
    assert (message.format(prefix=prefix) in found) if message else found.startswith(f"{beside}: whole")
