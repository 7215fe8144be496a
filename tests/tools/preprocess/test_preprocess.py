"""All of `tools.preprocess`: GPT-NeoX's bytes for every tokenizer, and whole files or none."""

import gzip
import io
import itertools
import json
import struct
import sys
import tarfile
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.records.document import decode
from openchatkit.data.stores import builder
from openchatkit.data.stores.pace import Pace
from openchatkit.data.stores.tokenise import tokenise
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats.token_store import TokenStore, mask_path
from openchatkit.storage import own_folder
from openchatkit.tools.preprocess import command as module
from openchatkit.tools.preprocess import work_folder
from openchatkit.tools.preprocess.command import main

CHATS = [f"<human>: What is {n}?\n<bot>: It is {n}, and that's it.\n<human>: Hm.\n" for n in range(40)]
BYTES = ["--tokenizer-type", "CharLevelTokenizer"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    return ended.value.code


def written(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    store = f"{prefix}_{key}_document"
    return Path(f"{store}.idx").read_bytes(), Path(f"{store}.bin").read_bytes()


def by_hand(documents: list[list[int]], *, vocab_size: int) -> tuple[bytes, bytes]:
    """GPT-NeoX's two files from the description of the format alone."""
    code, letter, size = (8, "H", 2) if vocab_size < 65500 else (4, "i", 4)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(document)) for document in documents)
    pointer = 0
    for document in documents:
        index += struct.pack("<q", pointer)
        pointer += size * len(document)
    index += b"".join(struct.pack("<q", number) for number in range(len(documents) + 1))
    tokens = array(letter, [token for document in documents for token in document])
    if sys.byteorder == "big":
        tokens.byteswap()
    return index, tokens.tobytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(CHATS))
    return path


def test_golden_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["ab", "", "c"]))
    assert run("--input", tmp_path / "a.jsonl", *BYTES, "--append-eod", "--output-prefix", tmp_path / "o") == 0
    index, tokens = written(tmp_path / "o")
    assert tokens.hex(" ", 2) == "6100 6200 0000 6300 0000"
    assert index.hex() == (
        "4d4d494449445800" "00"  # MMIDIDX and two zeros
        "0100000000000000" "08" "0200000000000000" "0300000000000000"  # version, uint16, sequences, borders
        "03000000" "02000000"  # sizes in tokens
        "0000000000000000" "0600000000000000"  # where they begin, in bytes
        "0000000000000000" "0100000000000000" "0200000000000000"  # a border before each document and after the last
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "o_text_document.bin", "o_text_document.idx"]


def test_any_column_of_a_table(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"title": ["ab", "c"], "text": ["x", "y"], "id": [1, 2]}), tmp_path / "a.parquet")
    keys = ["--jsonl-keys", "title", "text"]
    assert run("--input", tmp_path / "a.parquet", *BYTES, *keys, "--output-prefix", tmp_path / "o") == 0
    assert (tmp_path / "o_title_document.bin").read_bytes().hex(" ", 2) == "6100 6200 6300"
    assert (tmp_path / "o_text_document.bin").read_bytes().hex(" ", 2) == "7800 7900"


@pytest.mark.parametrize("vocab_size", [65499, 65500])
def test_both_types_of_token(tmp_path: Path, vocab_size: int) -> None:
    words = {f"t{number}": number for number in range(vocab_size - 1)} | {"<|endoftext|>": vocab_size - 1}
    tokenizer = Backend(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "a.jsonl").write_bytes(jsonl(["t7 t65000", "t1", "t2 t3 t4"]))
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab", tmp_path / "words.json", "--append-eod"]
    assert run("--input", tmp_path / "a.jsonl", *flags, "--output-prefix", tmp_path / "o") == 0
    end = vocab_size - 1
    assert written(tmp_path / "o") == by_hand([[7, 65000, end], [1, end], [2, 3, 4, end]], vocab_size=vocab_size)


def test_every_tokenizer_of_the_tokenizers_library(tiny_tokenizer: Path, tmp_path: Path, data: Path) -> None:
    backend = Backend.from_file(str(tiny_tokenizer / "tokenizer.json"))
    backend.model.save(str(tmp_path))
    expected = by_hand([backend.encode(text).ids for text in CHATS], vocab_size=384)
    kinds = {
        "HFTokenizer": ["--vocab-file", tiny_tokenizer / "tokenizer.json"],
        "HFGPT2Tokenizer": ["--vocab-file", tiny_tokenizer],
        "GPT2BPETokenizer": ["--vocab-file", tmp_path / "vocab.json", "--merge-file", tmp_path / "merges.txt"],
    }
    for kind, files in kinds.items():
        assert run("--input", data, "--tokenizer-type", kind, *files, "--output-prefix", tmp_path / kind) == 0
        assert written(tmp_path / kind) == expected, kind


def test_end_of_text_in_a_text_is_the_one_token_that_gpt_neox_has(
    tiny_tokenizer: Path, tmp_path: Path, data: Path
) -> None:
    backend = Backend.from_file(str(tiny_tokenizer / "tokenizer.json"))
    backend.model.save(str(tmp_path))
    files = ["--vocab-file", tmp_path / "vocab.json", "--merge-file", tmp_path / "merges.txt"]
    data.write_bytes(jsonl(["a<|endoftext|>b"]))
    kind = ["--tokenizer-type", "GPT2BPETokenizer", *files]
    assert run("--input", data, *kind, "--output-prefix", tmp_path / "o") == 0
    document = [*backend.encode("a").ids, backend.token_to_id("<|endoftext|>"), *backend.encode("b").ids]
    assert written(tmp_path / "o") == by_hand([document], vocab_size=384)


def test_a_mask_without_end_of_text_is_a_warning(
    tiny_tokenizer: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture
) -> None:
    kind = ["--tokenizer-type", "HFTokenizer", "--vocab-file", tiny_tokenizer / "tokenizer.json", "--loss-mask"]
    assert run("--input", data, *kind, "--output-prefix", tmp_path / "o") == 0
    assert "no model trained on this learns to end its last reply" in capsys.readouterr().err
    assert run("--input", data, *kind, "--append-eod", "--output-prefix", tmp_path / "p") == 0
    assert "learns to end its last reply" not in capsys.readouterr().err


def test_truncation_that_a_tokenizer_asks_for_is_off(tiny_tokenizer: Path, tmp_path: Path, data: Path) -> None:
    backend = Backend.from_file(str(tiny_tokenizer / "tokenizer.json"))
    documents = [backend.encode(text).ids for text in CHATS]
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "cut.json"))
    flags = [
        "--tokenizer-type",
        "HFTokenizer",
        "--vocab-file",
        tmp_path / "cut.json",
        "--output-prefix",
        tmp_path / "o",
    ]
    assert run("--input", data, *flags) == 0
    assert written(tmp_path / "o") == by_hand(documents, vocab_size=384)


def test_sentencepiece(tmp_path: Path, data: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CHATS),
        model_prefix=str(tmp_path / "pieces"),
        vocab_size=60,
        user_defined_symbols=["<|endoftext|>"],
        minloglevel=2,
    )
    model = tmp_path / "pieces.model"
    flags = [
        "--tokenizer-type",
        "SPMTokenizer",
        "--vocab-file",
        model,
        "--append-eod",
        "--output-prefix",
        tmp_path / "o",
    ]
    assert run("--input", data, *flags) == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    end = processor.piece_to_id("<|endoftext|>")
    assert written(tmp_path / "o") == by_hand([[*processor.encode(text), end] for text in CHATS], vocab_size=60)


def test_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    encoding = tiktoken.Encoding(
        "two",
        pat_str=r"\w+|\W+",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)} | {b"ab": 256},
        special_tokens={"<|endoftext|>": 257},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"two": encoding}.get)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["abc", "<|endoftext|>"]))
    flags = ["--tokenizer-type", "TiktokenTokenizer", "--vocab-file", "two", "--append-eod"]
    assert run("--input", tmp_path / "a.jsonl", *flags, "--output-prefix", tmp_path / "o") == 0
    documents = [[256, ord("c"), 257], [*b"<|endoftext|>", 257]]
    assert written(tmp_path / "o") == by_hand(documents, vocab_size=258)


def test_each_key_is_its_own_field(tmp_path: Path) -> None:
    rows = [{"title": "one", "text": "first"}, {"title": "", "text": "second"}, {"title": "three", "text": ["a", "b"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["--json-keys", "title", "text"]
    assert run("--input", tmp_path / "a.jsonl", *keys, *BYTES, "--output-prefix", tmp_path / "o") == 0
    assert written(tmp_path / "o", "title") == by_hand([list(b"one"), list(b"three")], vocab_size=512)
    texts = [list(b"first"), list(b"second"), list(b"a\n\nb")]
    assert written(tmp_path / "o", "text") == by_hand(texts, vocab_size=512)


def test_blank_texts_and_special_tokens_are_as_gpt_neox_has_them(tiny_tokenizer: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(tiny_tokenizer / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(jsonl([" \n", "a<|endoftext|>b"]))
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", tiny_tokenizer, "--output-prefix", tmp_path / "o"]
    assert run("--input", tmp_path / "a.jsonl", *flags) == 0
    documents = [backend.encode(" \n").ids, [*backend.encode("a").ids, 0, *backend.encode("b").ids]]
    assert written(tmp_path / "o") == by_hand(documents, vocab_size=384)


def test_files_of_several_kinds_in_one_list(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["one"])))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(["two"])))
    parquet.write_table(pa.table({"text": ["three"]}), tmp_path / "c.parquet")
    tar(tmp_path / "d.tar", {"x/1.jsonl.zst": zstandard.compress(jsonl(["four"])), "README": b"!"})
    tar(tmp_path / "e.tar.gz", {"1.jsonl": jsonl(["five", "six"]), "2.jsonl.gz": gzip.compress(jsonl(["seven"]))})
    names = ("a.jsonl.gz", "b.jsonl.zst", "c.parquet", "d.tar", "e.tar.gz")
    files = ",".join(str(tmp_path / name) for name in names)
    assert run("--input", files, *BYTES, "--output-prefix", tmp_path / "o") == 0
    assert f"{tmp_path / 'd.tar'}:README is not a file of records: skipped" in capsys.readouterr().err
    texts = ["one", "two", "three", "four", "five", "six", "seven"]
    assert written(tmp_path / "o") == by_hand([list(text.encode()) for text in texts], vocab_size=512)


def tar(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_truncated_archives(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    """Also between two members, where what is left looks like an archive, and inside a header."""
    rng = np.random.default_rng(1)
    texts = [rng.bytes(300).hex() for _ in range(4)]
    whole = tar(tmp_path / name, {f"{number}.jsonl": jsonl([text]) for number, text in enumerate(texts)})
    member = 512 + 1024  # of a plain archive: the header and the padded text
    for size in (2 * member, 2 * member + 700, member - 3, 100) if name == "a.tar" else (len(whole) - 4, 700, 40):
        (tmp_path / name).write_bytes(whole[:size])
        assert run("--input", tmp_path / name, *BYTES, "--output-prefix", tmp_path / "o") == 2
        assert "cut short" in capsys.readouterr().err, size
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_archive_without_records(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tar(tmp_path / "a.tar", {"README": b"!"})
    assert run("--input", tmp_path / "a.tar", *BYTES, "--output-prefix", tmp_path / "o") == 2
    assert "a.tar holds no files of records: expected names in .jsonl" in capsys.readouterr().err


def test_the_loss_mask_is_the_one_of_training(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Tokens and mask of either form of a chat are those of a cached store."""
    tokenizer = Tokenizer(tiny_tokenizer)
    messages = [{"role": "user", "content": "Hi<|endoftext|>"}, {"role": "assistant", "content": "Ho"}]
    forms = {"text": jsonl(CHATS), "messages": json.dumps({"messages": messages}).encode() + b"\n"}
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", tiny_tokenizer, "--append-eod", "--loss-mask"]
    for key, rows in forms.items():
        (tmp_path / f"{key}.jsonl").write_bytes(rows)
        where = ["--input", tmp_path / f"{key}.jsonl", "--jsonl-keys", key, "--output-prefix", tmp_path / "o"]
        assert run(*where, *flags) == 0
        store = TokenStore(tmp_path / f"o_{key}_document")
        expected = tokenise(rows.splitlines(), tokenizer.encode, [tokenizer.end_of_text])
        assert store.tokens.tolist() == expected.tokens.tolist()
        assert store.sizes.tolist() == expected.sizes.tolist()
        assert store.mask.tolist() == expected.mask.tolist()
        assert 0 < store.mask.sum() < len(store.mask)


@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_training_on_a_store_is_training_on_its_records(
    tiny_tokenizer: Path, tmp_path: Path, data: Path, loss_on: str
) -> None:
    flags = ["--tokenizer-type", "HFTokenizer", "--vocab-file", tiny_tokenizer, "--append-eod", "--loss-mask"]
    assert run("--input", data, *flags, "--output-prefix", tmp_path / "o") == 0
    options = DataOptions(tiny_tokenizer, seq_length=48, loss_on=loss_on, data_cache=tmp_path / "cache")
    ours, records = (build_dataset(str(name), options) for name in (tmp_path / "o_text_document", data))
    assert ours.epoch_samples == records.epoch_samples
    batch, expected = (dataset.batch(0, 2 * dataset.epoch_samples) for dataset in (ours, records))
    assert (batch.tokens == expected.tokens).all()
    assert (batch.labels == expected.labels).all()


def test_without_roles_there_is_no_mask_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["no roles"]))
    assert run("--input", tmp_path / "a.jsonl", *BYTES, "--loss-mask", "--output-prefix", tmp_path / "o") == 0
    assert "no text under 'text' has a line that begins with <bot>:: there is no mask" in capsys.readouterr().err
    assert not mask_path(tmp_path / "o_text_document").exists()


def test_ftfy(tmp_path: Path) -> None:
    row = {"text": "schÃ¶n", "messages": [{"role": "assistant", "content": "schÃ¶n"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--input", tmp_path / "a.jsonl", *BYTES, "--ftfy", "--output-prefix", tmp_path / "o"]
    assert run(*flags) == 0
    assert written(tmp_path / "o")[1].decode("utf-16-le") == "schön".encode().decode("latin-1")
    assert run(*flags, "--jsonl-keys", "messages", "--loss-mask") == 0
    expected = "".join(segment.text for segment in decode(b'{"text": "<bot>: sch\xc3\xb6n\\n"}'))
    assert bytes(TokenStore(tmp_path / "o_messages_document").tokens.astype("u1")).decode() == expected


def test_workers_write_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--input", data, *BYTES, "--loss-mask", "--workers", 1, "--output-prefix", tmp_path / "one") == 0
    monkeypatch.setattr(module, "PACE", Pace(alone_bytes=0, batch_bytes=300))
    assert run("--input", data, *BYTES, "--loss-mask", "--workers", 2, "--output-prefix", tmp_path / "two") == 0
    assert written(tmp_path / "one") == written(tmp_path / "two")
    masks = [mask_path(tmp_path / f"{name}_text_document").read_bytes() for name in ("one", "two")]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_stopped_run_continues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, after: int
) -> None:
    """By Ctrl-C, and, with what was appended since the last note, by a kill."""
    data.write_bytes(data.read_bytes().replace(b'"text"', b'"tex"', 1))
    flags = ["--input", data, *BYTES, "--loss-mask", "--bad-rows", "quarantine", "--output-prefix"]
    assert run(*flags, tmp_path / "whole") == 0
    monkeypatch.setattr(module, "PACE", Pace(batch_bytes=300))
    encode, batches = module.fields.encode, itertools.count()

    def stop(error: BaseException) -> None:
        def stopping(*arguments: object) -> object:
            if next(batches) == after:
                raise error
            return encode(*arguments)

        monkeypatch.setattr(module.fields, "encode", stopping)

    stop(KeyboardInterrupt())
    assert run(*flags, tmp_path / "o") == 130
    assert "stopped; the same command continues after row" in capsys.readouterr().err
    assert not list(tmp_path.glob("o_*"))
    work = tmp_path / ".o.partial"
    for name in ("text.bin", "text.idx", "text.mask.bin", "quarantine.jsonl"):
        with open(work / name, "ab") as file:
            file.write(b"appended after the note")
    monkeypatch.setattr(module.fields, "encode", encode)
    assert run(*flags, tmp_path / "o") == 0
    said = capsys.readouterr().err
    assert "continues after row" in said
    assert f"1 of 40 rows set aside, listed in {tmp_path / 'o_quarantine.jsonl'}" in said
    assert written(tmp_path / "o") == written(tmp_path / "whole")
    for ending in ("text_document.mask.bin", "quarantine.jsonl"):
        assert (tmp_path / f"o_{ending}").read_bytes() == (tmp_path / f"whole_{ending}").read_bytes()
    assert not work.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_stopped_at_the_very_end_continues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: BaseException
) -> None:
    """When all files are closed, and are forced to disk before they get their names."""
    flags = ["--input", data, *BYTES, "--loss-mask", "--output-prefix"]
    assert run(*flags, tmp_path / "whole") == 0
    sync = work_folder.storage.sync

    def stop(path: Path) -> None:
        if path.name == "text.idx":
            raise error
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(work_folder.storage, "sync", stop)
        assert run(*flags, tmp_path / "o") in (2, 130)
    assert not list(tmp_path.glob("o_*"))
    capsys.readouterr()
    assert run(*flags, tmp_path / "o") == 0
    assert "continues after row 40" in capsys.readouterr().err
    assert written(tmp_path / "o") == written(tmp_path / "whole")
    assert not (tmp_path / ".o.partial").exists()


@pytest.mark.parametrize("damage", ["another input", "another option", "cut", "unreadable"])
def test_unfitting_work_is_started_from_scratch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, damage: str
) -> None:
    monkeypatch.setattr(module, "PACE", Pace(batch_bytes=300, save_seconds=0.0))
    flags = ["--input", data, *BYTES, "--output-prefix", tmp_path / "o"]
    encode, batches = module.fields.encode, itertools.count()

    def stopping(*arguments: object) -> object:
        if next(batches) == 5:
            raise MemoryError
        return encode(*arguments)

    monkeypatch.setattr(module.fields, "encode", stopping)
    with pytest.raises(MemoryError):
        main([str(flag) for flag in flags])
    assert (tmp_path / ".o.partial" / "text.bin").stat().st_size
    monkeypatch.setattr(module.fields, "encode", encode)
    end = []
    if damage == "another input":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "another option":
        flags.append("--append-eod")
        end = [0]
    elif damage == "cut":
        (tmp_path / ".o.partial" / "text.bin").write_bytes(b"")
    else:
        (tmp_path / ".o.partial" / "progress.json").write_text("{")
    assert run(*flags) == 0
    assert "continues after" not in capsys.readouterr().err
    assert written(tmp_path / "o") == by_hand([[*text.encode(), *end] for text in CHATS], vocab_size=512)


def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [b'{"text": "one"}', b"{", b'{"text": null}', b'{"other": 1}', b'{"text": "a\\u0000"}', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    flags = ["--input", tmp_path / "a.jsonl", *BYTES, "--output-prefix", tmp_path / "o"]
    assert run(*flags) == 2
    assert f"error: {tmp_path / 'a.jsonl'}:2: not JSON" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert run(*flags, "--bad-rows", "quarantine") == 0
    assert written(tmp_path / "o") == by_hand([list(b"one"), list(b"two")], vocab_size=512)
    listed = [json.loads(line) for line in (tmp_path / "o_quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [2, 3, 4, 5]
    assert {row["file"] for row in listed} == {str(tmp_path / "a.jsonl")}
    assert listed[1]["reason"] == "expected 'text' to be a string, found null"
    assert listed[2]["reason"] == "the record has no 'text' (its keys: 'other')"
    # A later run without bad rows leaves no list of an earlier one's.
    (tmp_path / "a.jsonl").write_bytes(rows[0])
    assert run(*flags) == 2
    assert "o_text_document.idx is there already" in capsys.readouterr().err
    assert run(*flags, "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "o_text_document.bin", "o_text_document.idx"]


def test_overwriting_removes_an_old_mask(data: Path, tmp_path: Path) -> None:
    flags = ["--input", data, *BYTES, "--output-prefix", tmp_path / "o"]
    assert run(*flags, "--loss-mask") == 0
    assert mask_path(tmp_path / "o_text_document").exists()
    assert run(*flags, "--overwrite") == 0
    assert not mask_path(tmp_path / "o_text_document").exists()


def test_input_changed_during_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    encode = module.fields.encode

    def appending(*arguments: object) -> object:
        data.write_bytes(data.read_bytes() + jsonl(["more"]))
        return encode(*arguments)

    monkeypatch.setattr(module.fields, "encode", appending)
    assert run("--input", data, *BYTES, "--output-prefix", tmp_path / "o") == 2
    assert "the input was changed while it was tokenised" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]


def test_input_removed_during_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    encode = module.fields.encode
    monkeypatch.setattr(module.fields, "encode", lambda *arguments: data.unlink() or encode(*arguments))
    assert run("--input", data, *BYTES, "--output-prefix", tmp_path / "o") == 2
    assert "the input was changed while it was tokenised" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with own_folder(tmp_path / ".o.partial"):
        assert run("--input", data, *BYTES, "--output-prefix", tmp_path / "o") == 2
    assert f"another process is writing {tmp_path / '.o.partial'}" in capsys.readouterr().err
    assert run("--input", data, *BYTES, "--output-prefix", tmp_path / "o") == 0


def test_a_full_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder.TokenStoreWriter, "add", full)
    assert run("--input", data, *BYTES, "--output-prefix", tmp_path / "o") == 2
    assert "No space left on device: make room or choose another --output-prefix" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset-impl", "lazy"], "--dataset-impl lazy: only mmap is written"),
        (["--dataset-impl", "cached"], "--dataset-impl cached: only mmap is written"),
        (["--input", "{tmp}/none.jsonl"], "none.jsonl: there is no such file"),
        (["--input", "{tmp}/a.text"], "a.text: expected a name that ends in .jsonl"),
        (["--split-sentences"], "--split-sentences is for models of sentences, as BERT: documents are kept whole here"),
        (["--keep-newlines"], "--keep-newlines is for models of sentences, as BERT: documents are kept whole here"),
        (["--mask-before-token", "1,x"], "--mask-before-token '1,x': expected ids such as 1,2,3, each below 512"),
        (["--mask-before-token", "512"], "--mask-before-token '512': expected ids such as 1,2,3, each below 512"),
        (
            ["--mask-before-token", "1", "--loss-mask"],
            "--mask-before-token and --loss-mask both say what",
        ),
        (
            ["--mask-before-token", "1", "--json-keys", "a", "b"],
            "one of --jsonl-keys, other than label: found a b",
        ),
        (
            ["--mask-before-token", "1", "--json-keys", "label"],
            "one of --jsonl-keys, other than label: found label",
        ),
        (["--input", ","], "--input names no file"),
        (["--input", "x" * 300 + ".jsonl"], "xxx.jsonl cannot be read: File name too long"),
        (["--jsonl-keys", "a/b"], "--jsonl-keys 'a/b': a file is named after it"),
        (["--jsonl-keys", ""], "--jsonl-keys '': a file is named after it"),
        (["--jsonl-keys", "none"], "the record has no 'none' (its keys: 'text')"),
        (["--input", "{tmp}/a.parquet", "--jsonl-keys", "title"], "a.parquet has no column 'title'"),
        (["--input", "{tmp}/empty.jsonl"], "--jsonl-keys text: none of 1 rows has a text there"),
        (["--tokenizer-type", "HFTokenizer"], "HFTokenizer needs --vocab-file: a tokenizer.json"),
        (["--tokenizer-type", "GPT2BPETokenizer", "--vocab", "{tmp}/a.txt"], "needs --merge-file: its merges.txt"),
        (["--tokenizer-type", "HFTokenizer", "--vocab", "{tmp}/none"], "HFTokenizer: there is no"),
        (["--tokenizer-type", "HFTokenizer", "--vocab", "{tmp}/a.txt"], "cannot be loaded as HFTokenizer"),
        (["--tokenizer-type", "SPMTokenizer", "--vocab", "{tmp}/a.txt"], "expected a SentencePiece .model"),
        (["--tokenizer-type", "TiktokenTokenizer", "--vocab", "none"], "expected the name of an encoding"),
        (["--tokenizer-type", "HFTokenizer", "--vocab", "{tmp}/no_end.json", "--append-eod"], "no <|endoftext|> token"),
    ],
)
def test_mistakes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.text").write_text("text")
    parquet.write_table(pa.table({"text": ["hi"]}), tmp_path / "a.parquet")
    (tmp_path / "empty.jsonl").write_bytes(jsonl([""]))
    Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "no_end.json"))
    before = sorted(tmp_path.iterdir())
    given = ["--input", data, *BYTES, "--output-prefix", tmp_path / "o"]
    assert run(*given, *[flag.format(tmp=tmp_path) for flag in flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("ftfy", [*BYTES, "--ftfy"]),
        ("sentencepiece", ["--tokenizer-type", "SPMTokenizer", "--vocab-file", "{tmp}/data.jsonl"]),
        ("tiktoken", ["--tokenizer-type", "TiktokenTokenizer", "--vocab-file", "cl100k_base"]),
    ],
)
def test_missing_packages(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    package: str,
    flags: list[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    argv = [str(flag).format(tmp=tmp_path) for flag in flags]
    assert run("--input", data, *argv, "--output-prefix", tmp_path / "o") == 2
    assert f"needs a package: pip install {package}" in capsys.readouterr().err
