"""From `data.records` to `data.stores.cache`: every row of any file is a document or is listed as set aside."""

import bz2
import gzip
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openchatkit.data.records.document import BadRowError, decode
from openchatkit.data.stores.cache import cached_store
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats.cached_store import quarantine_path

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = st.one_of(
    st.sampled_from(["", " ", "<human>: a\n<bot>: b\n", "\u2028", "a\0b", "\ud83d", "<|endoftext|>"]),
    st.text(max_size=12),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.one_of(TEXTS, st.none())},
        optional={
            "weight": st.sampled_from([0, 1, 2, None]),
            "passages": st.lists(TEXTS, max_size=2),
            "tool_calls": st.sampled_from([[], [{"id": 1}]]),
        },
    ),
    max_size=4,
)
VALUES = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"messages": MESSAGES}),
    st.fixed_dictionaries({"text": st.sampled_from(["", None, "x"]), "messages": MESSAGES}),
    st.sampled_from([1, None, [], {}, "text", {"other": 1}, {"text": 1}]),
)
LINES = st.one_of(
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"{", b"\xff\xfe", b'{"text": "a"} trailing', b"", b"   ", b'{"text": "a\xff"}']),
)


def is_document(data: bytes) -> bool:
    """Return whether a row is a document."""
    try:
        decode(data)
    except BadRowError:
        return False
    return True


def check(tokenizer: Tokenizer, data: bytes, name: str, rows: list[tuple[int, bytes]]) -> None:
    """`rows` are the numbers and bytes of the rows that a file of this name and content has."""
    good = [number for number, row in rows if is_document(row)]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / name
        source.write_bytes(data)
        how = {"separator": "end-of-text", "bad_rows": "quarantine", "cache_dir": Path(temporary) / "cache"}
        if not good:
            with pytest.raises(UserError, match=r"holds no records|none of its .* rows is a record"):
                cached_store(source, tokenizer=tokenizer, **how)
            return
        store, record = cached_store(source, tokenizer=tokenizer, **how)
        listed = quarantine_path(store.prefix.parent)
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        named = [json.loads(line)["line"] for line in lines]
        assert sorted([*good, *named]) == [number for number, _ in rows]
        assert not set(good).intersection(named)
        assert (record.rows, record.documents, record.quarantined) == (len(rows), len(good), len(named))
        texts = ["".join(segment.text for segment in decode(row)) for number, row in rows if number in good]
        found = [tokenizer.decode(store.document(number)[:-1].tolist()) for number in range(store.documents)]
        assert found == texts


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, str, list[tuple[int, bytes]]]:
    """A file's bytes, its name, and its rows."""
    packing = draw(st.sampled_from(list(PACK)))
    if draw(st.booleans()):
        lines = draw(st.lists(LINES, min_size=1, max_size=6))
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        data = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n"]))
        return PACK[packing](data), draw(st.sampled_from(["a.jsonl", "a.ndjson", "A.JSONL"])) + packing, rows
    values = draw(st.lists(VALUES, min_size=1, max_size=6))
    data = json.dumps(values, indent=draw(st.sampled_from([None, 1]))).encode()
    rows = [(number, json.dumps(value).encode()) for number, value in enumerate(values, 1)]
    return PACK[packing](data), "a.json" + packing, rows


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, suppress_health_check=HEALTH)
@given(file=files())
def test_rows_in_are_rows_used_and_rows_named(
    tokenizer: Tokenizer, file: tuple[bytes, str, list[tuple[int, bytes]]]
) -> None:
    check(tokenizer, *file)


@pytest.mark.long
@pytest.mark.timeout(900)
@settings(max_examples=2_000, deadline=None, suppress_health_check=HEALTH)
@given(file=files())
def test_rows_in_are_rows_used_and_rows_named_in_2000_files(
    tokenizer: Tokenizer, file: tuple[bytes, str, list[tuple[int, bytes]]]
) -> None:
    check(tokenizer, *file)
