"""`data.stores.cache`: stores are built once, whole or not at all, by one of any number of processes."""

import errno
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from forkserver import context

from openchatkit import storage
from openchatkit.data.stores import builder, cache
from openchatkit.data.stores.cache import cached_store, content_hash, store_identity
from openchatkit.errors import UserError
from openchatkit.formats.cached_store import StoreRecord
from openchatkit.formats.token_store import TokenStore


class Bytes:
    """A tokenizer of bytes that is quick to load; each call of `encode` leaves a mark and takes a while."""

    vocab_size = 257
    end_of_text = 256
    end_of_text_token = "<end>"

    def __init__(self, marks: Path, *, digest: str = "bytes", seconds: float = 0.0) -> None:
        self.marks = marks
        self.digest = digest
        self.seconds = seconds

    def encode(self, texts: list[str]) -> list[list[int]]:
        with self.marks.open("a") as file:
            file.write("x")
        time.sleep(self.seconds)
        return [list(text.encode()) for text in texts]

    def calls(self) -> int:
        return len(self.marks.read_text()) if self.marks.exists() else 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "<human>: a\\n<bot>: b\\n"}\n{"text": "plain"}\n')
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Bytes:
    return Bytes(tmp_path / "marks")


def build(source: Path, tokenizer: Bytes, *, separator: str = "end-of-text") -> tuple[TokenStore, StoreRecord]:
    return cached_store(
        source, tokenizer=tokenizer, separator=separator, bad_rows="error", cache_dir=source.parent / "cache"
    )


def folders(source: Path) -> list[str]:
    """What lies in the cache, but for locks and hashes."""
    names = (path.name for path in (source.parent / "cache").iterdir())
    return sorted(name for name in names if not name.endswith(".lock") and name != "hashes")


def age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a file count as old enough for its hash to be remembered: nobody can set the time of change."""
    os.utime(path, ns=(path.stat().st_atime_ns, 10**18))
    monkeypatch.setattr(storage, "SETTLED_SECONDS", -3600.0)


def test_contents(source: Path, tokenizer: Bytes) -> None:
    store, record = build(source, tokenizer)
    assert bytes(store.document(0)[:-1].tolist()) == b"<human>: a\n<bot>: b\n"
    assert [store.document(n)[-1] for n in range(2)] == [256, 256]
    assert store.mask.sum() == len(" b\n") + 1
    assert (record.rows, record.documents, record.quarantined) == (2, 2, 0)
    assert (record.tokens, record.trained_tokens) == (len(store.tokens), 4)
    assert sorted(path.name for path in store.prefix.parent.iterdir()) == [
        "store.json",
        "tokens.bin",
        "tokens.idx",
        "tokens.mask.bin",
    ]
    assert record.source == str(source)


def test_end_of_text_in_a_text_is_logged(tmp_path: Path, tokenizer: Bytes, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "spelled.jsonl"
    path.write_text('{"text": "a<end>b"}\n{"text": "plain"}\n{"text": "<end>"}\n')
    for _ in range(2):
        assert build(path, tokenizer)[1].spelled == 2
        assert "2 of 3 documents have <end> in their text, which is learnt as characters" in capsys.readouterr().err


def test_a_store_is_built_once_and_found_by_content(source: Path, tokenizer: Bytes) -> None:
    build(source, tokenizer)
    assert tokenizer.calls() == 1
    moved = source.rename(source.with_name("elsewhere.jsonl"))
    moved = moved.rename(source)
    os.utime(moved)
    build(moved, tokenizer)
    assert tokenizer.calls() == 1
    build(moved, tokenizer, separator="newline")
    build(moved, Bytes(tokenizer.marks, digest="another"))
    assert tokenizer.calls() == 4, "one more for the newline itself"
    moved.write_text('{"text": "edited"}\n')
    assert build(moved, tokenizer)[1].documents == 1
    assert tokenizer.calls() == 5
    assert len(folders(source)) == 4


def test_a_hash_is_kept_until_the_file_changes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(cache, "hash_files", lambda path, size: read.append(path) or f"{len(read):064}")
    monkeypatch.setattr(storage, "SETTLED_SECONDS", 3600.0)  # a moment ago, however slow the machine
    content_hash(source, tmp_path)
    content_hash(source, tmp_path)
    assert len(read) == 2, "a file changed a moment ago may change again unseen"
    age(source, monkeypatch)
    assert content_hash(source, tmp_path) == content_hash(source, tmp_path)
    assert len(read) == 3
    for memory in (tmp_path / "hashes").glob("*.json"):
        memory.write_text("[]")
    content_hash(source, tmp_path)
    assert len(read) == 4
    source.write_text(source.read_text() + "\n")
    age(source, monkeypatch)
    content_hash(source, tmp_path)
    assert len(read) == 5


def test_another_file_with_the_times_of_the_old_one(
    source: Path, tokenizer: Bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tar, rsync and git set times of modification: an equal size and an equal time are no proof of an equal file."""
    for text in ("OLDOLD", "NEWNEW"):
        source.write_text(json.dumps({"text": text}))
        age(source, monkeypatch)
        store, _ = build(source, tokenizer)
        assert bytes(store.document(0)[:-1].tolist()) == text.encode()


def test_a_file_system_without_times_of_change(source: Path, tokenizer: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = storage.stamp
    monkeypatch.setattr(storage, "stamp", lambda path: [*plain(path)[:2], 0, 0])
    for text in ("OLDOLD", "NEWNEW"):
        source.write_text(json.dumps({"text": text}))
        age(source, monkeypatch)
        store, _ = build(source, tokenizer)
        assert bytes(store.document(0)[:-1].tolist()) == text.encode()


def test_a_saved_dataset(tmp_path: Path, tokenizer: Bytes) -> None:
    """Found again wherever it is, by the bytes of its files, not by what others keep beside them."""
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(folder)
    assert build(folder, tokenizer)[1].documents == 2
    (folder / "cache-1.arrow").touch()
    build(folder.rename(tmp_path / "moved"), tokenizer)
    assert tokenizer.calls() == 1
    datasets.Dataset.from_dict({"text": ["three"]}).save_to_disk(folder)
    assert build(folder, tokenizer)[1].documents == 1


def test_a_large_file_is_hashed_as_a_small_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256(source.read_bytes()).hexdigest()
    assert content_hash(source, tmp_path) == expected
    monkeypatch.setattr(cache, "PIECE_BYTES", 7)
    monkeypatch.setattr(cache, "LARGE_BYTES", 1)
    assert content_hash(source, tmp_path) == expected


def test_identity_of_a_store_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PIECE_BYTES", 4)
    for name in ("a", "b"):
        (tmp_path / f"{name}.idx").write_bytes(b"index")
        (tmp_path / f"{name}.bin").write_bytes(b"0123456789")
    identity = store_identity(tmp_path / "a", tmp_path / "cache")
    assert store_identity(tmp_path / "b", tmp_path / "cache") == identity
    changes = [(".bin", b"01234567890"), (".bin", b"0123456780"), (".bin", b"1123456789"), (".idx", b"iNdex")]
    found = {identity}
    for suffix, content in [*changes, (".mask.bin", b"1" * 10), (".mask.bin", b"0" * 10)]:
        for path in tmp_path.glob("b*"):
            path.unlink()
        (tmp_path / "b.idx").write_bytes(b"index")
        (tmp_path / "b.bin").write_bytes(b"0123456789")
        (tmp_path / f"b{suffix}").write_bytes(content)
        found.add(store_identity(tmp_path / "b", tmp_path / "cache"))
    assert len(found) == 7


def test_a_missing_source_is_not_the_caches_fault(source: Path, tokenizer: Bytes) -> None:
    source.unlink()
    with pytest.raises(UserError, match=r"chats\.jsonl cannot be read: No such file"):
        build(source, tokenizer)


def build_in_child(source: Path, tokenizer: Bytes, results: object) -> None:
    try:
        results.put(build(source, tokenizer)[1].documents)
    except UserError as error:
        results.put(str(error))


def test_one_of_many_processes_builds(source: Path, tokenizer: Bytes) -> None:
    tokenizer.seconds = 0.5
    results = context.Queue()
    children = [context.Process(target=build_in_child, args=(source, tokenizer, results)) for _ in range(4)]
    for child in children:
        child.start()
    assert [results.get(timeout=60) for _ in children] == [2] * 4
    for child in children:
        child.join()
    assert tokenizer.calls() == 1


def test_a_killed_build_leaves_no_store_and_the_next_one_clears_up(source: Path, tokenizer: Bytes) -> None:
    slow = Bytes(tokenizer.marks, seconds=60)
    results = context.Queue()
    child = context.Process(target=build_in_child, args=(source, slow, results))
    child.start()
    deadline = time.monotonic() + 60
    while not slow.calls():
        assert child.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert [name.startswith(".") for name in folders(source)] == [True]
    assert build(source, tokenizer)[1].documents == 2
    assert [name.startswith("chats-") for name in folders(source)] == [True]


def test_a_failed_build_leaves_nothing(source: Path, tokenizer: Bytes) -> None:
    with source.open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"chats\.jsonl:3: the record has no 'text'"):
        build(source, tokenizer)
    assert folders(source) == []


def test_a_source_changed_during_the_build(source: Path, tokenizer: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts: source.write_text("{}\n") and encode(texts))
    with pytest.raises(UserError, match=r"chats\.jsonl was changed while it was tokenised"):
        build(source, tokenizer)
    assert folders(source) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"cannot write tokens to .*cache: the disk is full: make room, then run .* again: it continues"),
        (errno.EIO, r"cannot write tokens to .*cache: the disk reports an error"),
    ],
)
def test_disk_errors(
    source: Path, tokenizer: Bytes, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(builder.TokenStoreWriter, "add", fail)
    with pytest.raises(UserError, match=message):
        build(source, tokenizer)
    assert folders(source) == []


def test_file_system_without_locks(source: Path, tokenizer: Bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(storage.fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"tokens to .*cache: its file system has no file locks"):
        build(source, tokenizer)


def test_cache_that_is_a_file(source: Path, tokenizer: Bytes) -> None:
    (source.parent / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write tokens to .*cache: part of the path is a file"):
        build(source, tokenizer)


def test_damaged_store_is_named(source: Path, tokenizer: Bytes) -> None:
    store, _ = build(source, tokenizer)
    folder = store.prefix.parent
    (folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokens\.bin holds 0 bytes where \d+ belong"):
        build(source, tokenizer)
    record = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(record)[:-5])
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        build(source, tokenizer)
