"""Records of every kind of file, and the line that is named when one is broken."""

import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from openchatkit.data.records import Records
from openchatkit.errors import UserError

TEXTS = ["<human>: Hé\n<bot>: 你好\u2028there\n", "two", "three\r\nlines\n"]


def lines(texts: list[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"text": t, "meta": 1}, ensure_ascii=False).encode() + b"\n" for t in texts)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def read(path: Path, data: bytes | None = None) -> list[tuple[int, str]]:
    if data is not None:
        path.write_bytes(data)
    with Records(path) as records:
        return list(records)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines()),
        ("a.jsonl", lines()[:-1]),
        ("a.jsonl", b"\xef\xbb\xbf" + lines()),
        ("a.jsonl", lines().replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(lines())),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS[:1])) + gzip.compress(lines(TEXTS[1:]))),
        ("a.jsonl.zst", zstd(lines())),
        ("a.jsonl.zst", zstd(lines(TEXTS[:1])) + zstd(b"") + zstd(lines(TEXTS[1:]))),
    ],
)
def test_reads(tmp_path: Path, name: str, data: bytes) -> None:
    assert read(tmp_path / name, data) == list(enumerate(TEXTS, start=1))


def test_empty_lines_are_no_records_but_count(tmp_path: Path) -> None:
    data = lines().replace(b"\n", b"\n \n", 1) + b"\n\n"
    assert [number for number, _ in read(tmp_path / "a.jsonl", data)] == [1, 3, 4]


def test_zstandard_frames_without_a_content_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        writer.write(lines(TEXTS * 50_000))
    assert len(read(tmp_path / "a.jsonl.zst", buffer.getvalue())) == 150_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"a\.jsonl:2: not JSON \(Expecting property name .* at character 2\)"),
        (b'{"text": "a\0b"}', r"a\.jsonl:2: not JSON \(Invalid control character"),
        (b"\0\0\0\0", r"a\.jsonl:2: not JSON"),
        (b"null", r'a\.jsonl:2: expected an object such as \{"text": "\.\.\."\}, found null'),
        (b'["text"]', r"a\.jsonl:2: .* found a list"),
        (b'"text"', r"a\.jsonl:2: .* found a string"),
        (b"12", r"a\.jsonl:2: .* found a number"),
        (b"1" * 5000, r"a\.jsonl:2: (no record: Exceeds the limit|.* found a number)"),
        (b"[" * 200_000, r"a\.jsonl:2: no record"),
        (b"{}", r"a\.jsonl:2: the record has no 'text' \(its keys: none\)"),
        (b'{"messages": [], "id": 1}', r"a\.jsonl:2: the record has no 'text' \(its keys: 'messages', 'id'\)"),
        (b'{"text": null}', r"a\.jsonl:2: expected 'text' to be a string, found null"),
        (b'{"text": true}', r"a\.jsonl:2: expected 'text' to be a string, found a truth value"),
        (b'{"text": {}}', r"a\.jsonl:2: expected 'text' to be a string, found an object"),
        (b'{"text": " \\n"}', r"a\.jsonl:2: 'text' is empty"),
        (b'{"text": "a\\u0000b"}', r"a\.jsonl:2: 'text' holds a NUL"),
        (b'{"text": "\\ud83d"}', r"a\.jsonl:2: 'text' holds half a surrogate pair"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl:2: byte 14 of the line is not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl", lines(["fine"]) + line + b"\n" + lines())


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl holds no records: expected lines such as"):
        read(tmp_path / "a.jsonl", data)


def test_empty_compressed_file(tmp_path: Path) -> None:
    for name, data in (("a.jsonl.gz", gzip.compress(b"")), ("a.jsonl.zst", zstd(b"")), ("b.jsonl.zst", b"")):
        with pytest.raises(UserError, match="holds no records"):
            read(tmp_path / name, data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_stream_is_an_error_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(lines()) if name.endswith("gz") else zstd(lines())
    for data in (whole, whole + whole):
        for size in range(len(data) - len(whole) + 1, len(data)):
            with pytest.raises(UserError, match="cut short or damaged behind line"):
                read(tmp_path / name, data[:size])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_what_is_not_compressed_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cut short or damaged behind line 0"):
        read(tmp_path / name, lines())


def test_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt is no file of records .* \.jsonl\.zst"):
        Records(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: No such file"):
        Records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UserError, match=r"b\.jsonl cannot be read: Is a directory"):
        Records(tmp_path / "b.jsonl")


def test_position_reaches_the_end_and_memory_stays_flat(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    generator = random.Random(0)
    path.write_bytes(zstd(lines([generator.randbytes(500).hex() for _ in range(5_000)])))
    tracemalloc.start()
    with Records(path) as records:
        for _ in records:
            pass
        assert records.position == path.stat().st_size
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
