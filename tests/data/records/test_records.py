"""`data.records.reader`, `json_files` and `tables`: rows of every kind of file, from any position, and damage."""

import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from openchatkit.data.records import json_files
from openchatkit.data.records.raw_row import ROW_LIMIT, START, Mark
from openchatkit.data.records.reader import Records, is_readable
from openchatkit.errors import UserError

TEXTS = ["<human>: Hé\n<bot>: 你好\u2028there\n", "two", "three\r\nlines\n"]


def lines(texts: list[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"text": t, "meta": 1}, ensure_ascii=False).encode() + b"\n" for t in texts)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def read(path: Path, data: bytes | None = None, start: Mark = START) -> list[tuple[int, str]]:
    """Numbers, and texts or errors."""
    if data is not None:
        path.write_bytes(data)
    with Records(path) as records:
        return [(row.number, row.error or json.loads(row.data)["text"]) for row in records.rows(start)]


def parquet(path: Path, columns: dict[str, list[object]], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines()),
        ("a.jsonl", lines()[:-1]),
        ("a.jsonl", b"\xef\xbb\xbf" + lines()),
        ("a.jsonl", lines().replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS[:1]), mtime=0) + gzip.compress(lines(TEXTS[1:]), mtime=0)),
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


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl holds no records: expected rows such as"):
        read(tmp_path / "a.jsonl", data)


def test_empty_compressed_file(tmp_path: Path) -> None:
    for name, data in (("a.jsonl.gz", gzip.compress(b"")), ("a.jsonl.zst", zstd(b"")), ("b.jsonl.zst", b"")):
        with pytest.raises(UserError, match="holds no records"):
            read(tmp_path / name, data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_stream_is_an_error_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(lines()) if name.endswith("gz") else zstd(lines())
    for data in (whole, whole + whole):
        for size in range(len(data) - len(whole) + 1, len(data)):
            with pytest.raises(UserError, match="cut short or damaged after line"):
                read(tmp_path / name, data[:size])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_uncompressed_data_under_a_compressed_name_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cut short or damaged after line 0"):
        read(tmp_path / name, lines())


def test_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt is no file of records .* \.jsonl, \.ndjson, .* \.parquet"):
        Records(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: No such file"):
        Records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UserError, match=r"b\.jsonl cannot be read: Is a directory"):
        Records(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"c\.parquet cannot be read: No such file"):
        Records(tmp_path / "c.parquet")


def test_position_reaches_the_end_and_memory_stays_flat(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    generator = random.Random(0)
    path.write_bytes(zstd(lines([generator.randbytes(500).hex() for _ in range(5_000)])))
    tracemalloc.start()
    with Records(path) as records:
        for _ in records.rows():
            pass
        assert records.position == records.size == path.stat().st_size
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved"])
def test_reading_continues_after_any_row(tmp_path: Path, name: str) -> None:
    texts = [f"text {n}" for n in range(7)]
    path = tmp_path / name
    data = b"\xef\xbb\xbf\n" + lines(texts).replace(b"\n", b"\n\n")
    if name == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    elif name == "a.parquet":
        parquet(path, {"text": texts, "other": texts}, row_group_size=3)
    else:
        path.write_bytes({"gz": gzip.compress, "zst": zstd}.get(name.split(".")[-1], bytes)(data))
    with Records(path) as records:
        rows = list(records.rows())
        assert records.position == records.size
    assert [json.loads(row.data)["text"] for row in rows] == texts
    for count, row in enumerate(rows, 1):
        assert [text for _, text in read(path, start=row.mark)] == texts[count:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_too_long_is_counted_and_skipped(tmp_path: Path, name: str, ending: bytes) -> None:
    compress = {"gz": gzip.compress, "zst": zstd}.get(name.split(".")[-1], bytes)
    long = b" " * (ROW_LIMIT + 1)
    found = read(tmp_path / name, compress(lines(TEXTS[:1]) + long + b"\n" + lines(TEXTS[1:2]) + long + ending))
    error = "longer than 16 MiB"
    assert found == [(1, TEXTS[0]), (2, error), (3, TEXTS[1]), (4, error)]
    fits = b'{"text":"' + b"a" * (ROW_LIMIT - 12) + b'"}\n'
    assert len(fits) == ROW_LIMIT
    assert read(tmp_path / name, compress(fits))[0][1][:2] == "aa"


@pytest.mark.parametrize(("name", "limit"), [("a.jsonl", 60), ("a.jsonl.gz", 60), ("a.jsonl.zst", 200)])
def test_memory_of_a_very_long_line(tmp_path: Path, name: str, limit: int) -> None:
    """Also where a few kilobytes of a file stand for all of it."""
    openers = {"a.jsonl": open, "a.jsonl.gz": gzip.open, "a.jsonl.zst": zstandard.open}
    with openers[name](tmp_path / name, "wb") as file:
        for _ in range(2 * limit):
            file.write(bytes(1 << 20))
        file.write(b'\n{"text": "fine"}\n')
    tracemalloc.start()
    assert read(tmp_path / name) == [(1, "longer than 16 MiB"), (2, "fine")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit << 20


def test_parquet_with_messages(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}], None]
    path = parquet(tmp_path / "a.parquet", {"messages": chats, "id": [1, 2]})
    with Records(path) as records:
        assert [json.loads(row.data) for row in records.rows()] == [{"messages": chat} for chat in chats]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).cast(pa.string(), safe=False)
    path = parquet(tmp_path / "a.parquet", {"text": text})
    assert read(path) == [(1, "one"), (2, "its text is not UTF-8"), (3, "three")]


def test_parquet_text_in_a_column_of_bytes(tmp_path: Path) -> None:
    """As writers leave it that do not mark it as text."""
    texts = pa.array([b"one", b"caf\xe9", "é".encode()], pa.binary())
    assert read(parquet(tmp_path / "a.parquet", {"text": texts})) == [
        (1, "one"),
        (2, "its text is not UTF-8"),
        (3, "é"),
    ]
    path = parquet(tmp_path / "b.parquet", {"messages": [[{"role": b"user", "content": b"a"}]]})
    with Records(path) as records:
        assert json.loads(next(records.rows()).data) == {"messages": [{"role": "user", "content": "a"}]}


def test_parquet_of_texts_with_labels(tmp_path: Path) -> None:
    columns = {"context": ["a"], "safety_label": ["__casual__"], "response": ["b"]}
    with Records(parquet(tmp_path / "a.parquet", columns)) as records:
        assert json.loads(next(records.rows()).data) == {"context": "a", "safety_label": "__casual__"}
    # Without a label, what is beside a text is nobody's business.
    with Records(parquet(tmp_path / "b.parquet", {"text": ["a"], "context": [b"\xe9"]})) as records:
        assert json.loads(next(records.rows()).data) == {"text": "a"}


def test_unusable_parquet_files_are_errors(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"texts": ["a"], "id": [1]})
    with pytest.raises(UserError, match=r"has no column 'text' nor 'messages' \(its columns: texts, id\)"):
        Records(path)
    with pytest.raises(UserError, match=r"a\.parquet holds no records"):
        read(parquet(path, {"text": pa.array([], pa.string())}))
    with pytest.raises(UserError, match=r"a\.parquet holds no records: the file is empty"):
        read(path, b"")
    data = parquet(path, {"text": [str(n) * 50 for n in range(2000)]}, write_page_checksum=True).read_bytes()
    with pytest.raises(UserError, match=r"a\.parquet is no parquet file, or cut short"):
        read(path, data[:-100])
    with pytest.raises(UserError, match=r"a\.parquet: cut short or damaged after row 0"):
        read(path, data[:400] + b"damage" + data[406:])


def test_saved_datasets(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]})
    datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(tmp_path / "both")
    assert [text for _, text in read(tmp_path / "both")] == TEXTS
    datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="has no split 'train': pass one of its folders, test"):
        Records(tmp_path / "one")
    assert [text for _, text in read(tmp_path / "one" / "test")] == TEXTS
    next((tmp_path / "one" / "test").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="test cannot be loaded by datasets: "):
        Records(tmp_path / "one" / "test")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="plain is no file of records"):
        Records(tmp_path / "plain")


ROWS = [{"text": f"row {number} \u00e9"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.NDJSON", LINES),
        ("A.JSONL", LINES),
        ("lines.json", LINES),
        ("array.json", json.dumps(ROWS).encode()),
        ("pretty.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode()),
    ],
)
def test_forms_of_json(tmp_path: Path, name: str, data: bytes, packing: str) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(PACK[packing](data))
    with Records(path) as records:
        rows = list(records.rows())
    assert [json.loads(row.data) for row in rows] == ROWS
    assert is_readable(path.name)
    with Records(path) as records:
        assert [json.loads(row.data) for row in records.rows(rows[2].mark)] == ROWS[3:]


@pytest.mark.parametrize("cut", [10, 60])
def test_a_truncated_array_is_an_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(ROWS).encode()[:-cut])
    with Records(path) as records, pytest.raises(UserError, match=r"a\.json: not JSON after row [2-4] "):
        list(records.rows())


def test_an_element_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "ROW_LIMIT", 40)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b" * 50}, {"text": "c"}]))
    with Records(tmp_path / "a.json") as records:
        assert [(row.number, bool(row.error)) for row in records.rows()] == [(1, False), (2, True), (3, False)]
