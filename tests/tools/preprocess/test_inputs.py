"""`tools.preprocess.inputs`: texts and zips, against the same documents in a file of records."""

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from openchatkit.formats.token_store import TokenStore
from openchatkit.tools.preprocess.command import main

TEXTS = ["<page>\r\n ü </page>\n\n", "two\n"]


def run(*files: Path, bad_rows: str = "error") -> int:
    target = files[0].parent / "o"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("--input", ",".join(map(str, files)), "--tokenizer-type", "CharLevelTokenizer", "--append-eod"),
                *("--output-prefix", str(target), "--bad-rows", bad_rows, "--overwrite", "--workers", "1"),
            ]
        )
    return ended.value.code


def documents(folder: Path) -> list[str]:
    store = TokenStore(folder / "o_text_document")
    found = [store.document(number).tolist() for number in range(store.documents)]
    assert all(document[-1] == 0 for document in found)
    return [bytes(document[:-1]).decode() for document in found]


def zip_up(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_text_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "B.TXT"]
    for path, text in zip(files, TEXTS, strict=True):
        path.write_bytes(text.encode())
    assert run(*files) == 0
    assert documents(tmp_path) == TEXTS


def test_a_text_longer_than_any_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("openchatkit.data.records.json_files.ROW_LIMIT", 1000)
    text = "0123456789abcdef\n" * 100
    (tmp_path / "a.jsonl").write_bytes(jsonl(text))
    assert run(tmp_path / "a.jsonl") == 2
    assert "a.jsonl:1: longer than" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text(text)
    assert run(tmp_path / "a.txt") == 0
    assert documents(tmp_path) == [text]


def test_a_zip_of_one_file_is_one_text_whatever_its_name(tmp_path: Path) -> None:
    """As enwik8.zip is."""
    assert run(zip_up(tmp_path / "a.zip", {"folder/": b"", "folder/enwik8": TEXTS[0].encode()})) == 0
    assert documents(tmp_path) == TEXTS[:1]
    assert run(zip_up(tmp_path / "a.zip", {"a.jsonl": jsonl(*TEXTS)})) == 0
    assert documents(tmp_path) == TEXTS


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_of_all_kinds(tmp_path: Path, method: int, capsys: pytest.CaptureFixture) -> None:
    array = json.dumps([{"text": "six"}]).encode()
    members = {
        "a.jsonl": jsonl("one", "two"),
        "b/c.txt": b"three",
        "README": b"!",
        "d.jsonl.gz": gzip.compress(jsonl("5")),
    }
    assert run(zip_up(tmp_path / "a.zip", members | {"e.json": array}, method)) == 0
    assert documents(tmp_path) == ["one", "two", "three", "5", "six"]
    assert "a.zip:README is not a file of records: skipped" in capsys.readouterr().err


def test_texts_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, data in {"1.txt": TEXTS[0].encode(), "2.jsonl": jsonl("two")}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert run(tmp_path / "a.tar.gz") == 0
    assert documents(tmp_path) == [TEXTS[0], "two"]


def test_a_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert run(tmp_path / "a.txt") == 2
    assert f"{tmp_path}/a.txt:1: byte 4 of the text is not UTF-8: mend or remove it" in capsys.readouterr().err
    members = {"1.txt": b"\xe9", "2.txt": b"two"}
    assert run(zip_up(tmp_path / "a.zip", members), bad_rows="quarantine") == 0
    assert documents(tmp_path) == ["two"]
    assert json.loads((tmp_path / "o_quarantine.jsonl").read_text())["file"] == f"{tmp_path}/a.zip:1.txt"


def test_a_text_too_long_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("openchatkit.tools.preprocess.texts._LIMIT", 1000)
    (tmp_path / "a.txt").write_bytes(b"x" * 1001)
    assert run(tmp_path / "a.txt") == 2
    assert "a.txt:1: the text is longer than 1.0 kB: mend or remove it" in capsys.readouterr().err


def test_damaged_zips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = zip_up(tmp_path / "a.zip", {"1.txt": b"one" * 1000, "2.txt": b"two"}, zipfile.ZIP_STORED)
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:50] + b"X" + whole[51:], b"no archive"):
        path.write_bytes(damaged)
        assert run(path) == 2
        assert f"{path} is cut short or damaged" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_a_zip_with_a_password(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = zip_up(tmp_path / "a.zip", {"1.txt": b"one"}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flags of the member, and those in the directory
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert run(path) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {path}: 1.txt cannot be read (")
    assert line.endswith("): unpack it")


def test_a_zip_of_nothing_to_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(zip_up(tmp_path / "a.zip", {"a.pdf": b"!", "b.pdf": b"!"})) == 2
    assert "a.zip holds no files of records: expected names in .jsonl" in capsys.readouterr().err
