"""The `.bin/.idx` store against bytes packed by hand, and errors for damaged stores."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from openchatkit.errors import UserError
from openchatkit.formats import token_store
from openchatkit.formats.token_store import StoreProgress, StoreRecord, TokenStore, TokenStoreWriter

DOCUMENTS = [[5, 6, 7], [65498], [0, 1, 2, 3]]


def write(prefix: Path, *, vocab_size: int = 65499, masked: bool = False) -> TokenStoreWriter:
    """A store of DOCUMENTS, added in two calls; the mask is 1 on even tokens."""
    with TokenStoreWriter(prefix, vocab_size=vocab_size, masked=masked) as writer:
        for documents in (DOCUMENTS[:2], DOCUMENTS[2:]):
            tokens = np.concatenate(documents)
            writer.add(tokens, np.array([len(d) for d in documents]), (tokens % 2 == 0) if masked else None)
    return writer


def packed(code: int, size: int) -> bytes:
    """The index of DOCUMENTS as gpt-neox writes it, for tokens of `size` bytes."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, 3, 4)
        + struct.pack("<3i", 3, 1, 4)
        + struct.pack("<3q", 0, 3 * size, 4 * size)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


@pytest.mark.parametrize(("vocab_size", "code", "letter", "size"), [(65499, 8, "H", 2), (65500, 4, "i", 4)])
def test_bytes(tmp_path: Path, vocab_size: int, code: int, letter: str, size: int) -> None:
    writer = write(tmp_path / "s", vocab_size=vocab_size)
    assert (tmp_path / "s.idx").read_bytes() == packed(code, size)
    assert (tmp_path / "s.bin").read_bytes() == struct.pack(f"<8{letter}", *np.concatenate(DOCUMENTS))
    assert not (tmp_path / "s.mask.bin").exists()
    assert (writer.documents, writer.tokens) == (3, 8)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_reads_every_whole_number_type(tmp_path: Path, code: int) -> None:
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    documents = [[5, 6, 7], [100], [0, 1, 2, 3]]
    (tmp_path / "s.idx").write_bytes(packed(code, struct.calcsize(letter)))
    (tmp_path / "s.bin").write_bytes(struct.pack(f"<8{letter}", *np.concatenate(documents)))
    store = TokenStore(tmp_path / "s")
    assert [store.document(n).tolist() for n in range(store.documents)] == documents
    assert store.starts(np.array([2, 0])).tolist() == [4, 0]
    assert store.mask is None


def test_some_of_its_documents(tmp_path: Path) -> None:
    write(tmp_path / "s", masked=True)
    whole = TokenStore(tmp_path / "s")
    part = whole.part(1, 3)
    assert [part.document(n).tolist() for n in range(part.documents)] == DOCUMENTS[1:]
    assert part.tokens.tolist() == [65498, 0, 1, 2, 3]
    assert part.starts(np.array([0, 1])).tolist() == [0, 1]
    assert part.mask.tolist() == whole.mask[3:].tolist()
    assert whole.part(0, 2).tokens.tolist() == [5, 6, 7, 65498]
    assert part.part(1, 2).document(0).tolist() == DOCUMENTS[2]
    with pytest.raises(UserError, match=r"s\[2:4\]: the store has documents 0 to 3"):
        whole.part(2, 4)


def test_mask_beside_it(tmp_path: Path) -> None:
    writer = write(tmp_path / "s", masked=True)
    assert (tmp_path / "s.mask.bin").read_bytes() == bytes([0, 1, 0, 1, 1, 0, 1, 0])
    store = TokenStore(tmp_path / "s")
    assert store.mask.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    assert writer.trained_tokens == 4


def test_index_of_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole")
    monkeypatch.setattr(token_store, "_PIECE", 2)
    write(tmp_path / "pieces")
    assert (tmp_path / "pieces.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def test_empty_documents_and_stores(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "none", vocab_size=10, masked=True):
        pass
    assert TokenStore(tmp_path / "none").documents == 0
    with TokenStoreWriter(tmp_path / "gap", vocab_size=10, masked=False) as writer:
        writer.add(np.array([1, 2]), np.array([0, 2, 0]))
    assert [TokenStore(tmp_path / "gap").document(n).tolist() for n in range(3)] == [[], [1, 2], []]


def test_unfinished_store_cannot_be_opened(tmp_path: Path) -> None:
    def die(writer: TokenStoreWriter) -> None:
        with writer:
            writer.add(np.array([1]), np.array([1]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die(TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=False))
    with pytest.raises(UserError, match="no token index"):
        TokenStore(tmp_path / "s")


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=False) as writer, pytest.raises(AssertionError):
        writer.add(np.array([10]), np.array([1]))


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", lambda data: data[:-1], r"s\.bin holds 15 bytes where 16 belong"),
        (".idx", lambda data: data[:-8], r"s\.idx holds \d+ bytes where \d+ belong"),
        (".idx", lambda data: data[:20], "no token index"),
        (".idx", lambda data: b"TNTIDX\0\0" + data, "--dataset-impl mmap"),
        (".idx", lambda data: b"{}" + data, r"expected it to begin with b'MMIDIDX"),
        (".idx", lambda data: data[:9] + b"\2" + data[10:], "version 2: only version 1"),
        (".idx", lambda data: data[:17] + b"\6" + data[18:], "dtype code 6: expected"),
        (".mask.bin", lambda data: data + b"\0", r"s\.mask\.bin holds 9 bytes where 8 belong"),
        (".bin", None, r"s\.bin is missing"),
        (".idx", None, r"s\.idx is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, suffix: str, change: object, message: str) -> None:
    write(tmp_path / "s", masked=True)
    path = tmp_path / f"s{suffix}"
    data = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(data))
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize("suffix", [".bin", ".mask.bin"])
def test_a_folder_in_place_of_a_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s", masked=True)
    path = tmp_path / f"s{suffix}"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"s{suffix} cannot be read: Is a directory"):
        TokenStore(tmp_path / "s")


def test_a_mask_that_trains_on_nothing_is_removed(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=True) as writer:
        writer.add(np.array([1, 2]), np.array([2]), np.array([False, False]))
    assert not (tmp_path / "s.mask.bin").exists()
    assert TokenStore(tmp_path / "s").mask is None


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_resumed_files_are_the_same(tmp_path: Path, done: int, closed: bool) -> None:
    """Whatever was appended behind the place that was saved, pointers and header included."""
    write(tmp_path / "whole", masked=True)
    prefix = tmp_path / "s"
    if closed:
        write(prefix, masked=True)
    else:
        writer = TokenStoreWriter(prefix, vocab_size=65499, masked=True)
        more = np.concatenate([*DOCUMENTS, [7, 8]])
        writer.add(more, np.array([3, 1, 4, 2]), more % 2 == 0)
        writer.sync()
    tokens = [sum(map(len, DOCUMENTS[:n])) for n in range(4)]
    trained = [0, 1, 2, 4][done]
    resume = StoreProgress(documents=done, tokens=tokens[done], trained_tokens=trained)
    with TokenStoreWriter(prefix, vocab_size=65499, masked=True, resume=resume) as writer:
        for document in map(np.array, DOCUMENTS[done:]):
            writer.add(document, np.array([len(document)]), document % 2 == 0)
    for suffix in (".bin", ".idx", ".mask.bin"):
        assert (tmp_path / f"s{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), suffix
    assert (writer.documents, writer.tokens, writer.trained_tokens) == (3, 8, 4)


def test_a_removed_mask_is_made_again(tmp_path: Path) -> None:
    """It is removed before the store gets its name, and the build may be killed in between."""
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=True) as writer:
        writer.add(np.array([1, 2]), np.array([2]), np.array([False, False]))
    resume = StoreProgress(documents=1, tokens=2)
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=True, resume=resume) as writer:
        writer.add(np.array([3]), np.array([1]), np.array([True]))
    assert TokenStore(tmp_path / "s").mask.tolist() == [0, 0, 1]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask.bin"])
def test_files_too_short_to_go_on_with(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s", masked=True)
    os.truncate(tmp_path / f"s{suffix}", 1)
    with pytest.raises(ValueError, match=rf"s{suffix} holds less than"):
        TokenStoreWriter(
            tmp_path / "s",
            vocab_size=65499,
            masked=True,
            resume=StoreProgress(documents=3, tokens=8, trained_tokens=4),
        )


def test_record(tmp_path: Path) -> None:
    assert token_store.read_record(tmp_path) is None
    record = StoreRecord(source="a.jsonl", key="k", rows=3, documents=1, quarantined=2, tokens=2, trained_tokens=0)
    token_store.write_record(tmp_path, record)
    assert token_store.read_record(tmp_path) == record
    for text in ("{", "[]", '{"source": "a"}'):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(UserError, match=r"store\.json is damaged .* delete"):
            token_store.read_record(tmp_path)


def test_a_record_that_loses_rows_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        token_store.write_record(tmp_path, StoreRecord("a.jsonl", "k", 4, 1, 2, 2, 0))


def test_progress(tmp_path: Path) -> None:
    assert token_store.read_progress(tmp_path) is None
    token_store.write_progress(tmp_path, StoreProgress(rows=3, row=5))
    assert token_store.read_progress(tmp_path) == StoreProgress(rows=3, row=5)
    (tmp_path / "progress.json").write_text("{")
    assert token_store.read_progress(tmp_path) is None
    token_store.remove_progress(tmp_path)
    assert list(tmp_path.iterdir()) == []
