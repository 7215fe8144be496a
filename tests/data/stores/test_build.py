"""`data.stores.build` and `builder`: a stopped build continues to the same bytes, and every row is accounted for."""

import contextlib
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from openchatkit.data.records import json_files
from openchatkit.data.stores import builder, workers
from openchatkit.data.stores import cache as cache_module
from openchatkit.data.stores.cache import cached_store
from openchatkit.data.stores.pace import Pace
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats.cached_store import StoreRecord
from openchatkit.formats.token_store import TokenStore

ROWS = 60
KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved"]


class Bytes:
    """A tokenizer of bytes that counts the texts it is given."""

    vocab_size = 257
    end_of_text = 256
    end_of_text_token = "<end>"
    digest = "bytes"

    def __init__(self) -> None:
        self.texts = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.texts += len(texts)
        return [list(text.encode()) for text in texts]


class KilledError(BaseException):
    """Stands for a kill: nothing between it and the end of the process saves anything."""


# A row or so a batch, saved after each; and the same without saving.
OFTEN = Pace(batch_bytes=1, save_tokens=1)
NEVER = replace(OFTEN, save_tokens=1 << 30)


def write(path: Path, texts: list[str | None]) -> Path:
    """Rows of any kind of file."""
    if path.name == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    else:
        data = "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode()
        path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    return path


def some_texts(*, bad: bool) -> list[str | None]:
    texts = [f"<human>: {'q' * (n % 5)}\n<bot>: {n}\n" if n % 3 else f"plain {n}" for n in range(ROWS)]
    return [None if bad and n % 10 == 4 else text for n, text in enumerate(texts)]


def build(
    source: Path, tokenizer: Bytes, *, bad_rows: str = "error", cache: str = "cache", pace: Pace = OFTEN
) -> tuple[TokenStore, StoreRecord]:
    return cached_store(
        source,
        tokenizer=tokenizer,
        separator="end-of-text",
        bad_rows=bad_rows,
        cache_dir=source.parent / cache,
        pace=pace,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(source: Path, cache: str = "cache") -> list[Path]:
    """What lies in a cache, but for locks and hashes."""
    paths = (source.parent / cache).iterdir()
    return [path for path in paths if not path.name.endswith(".lock") and path.name != "hashes"]


@contextlib.contextmanager
def stop_after(monkeypatch: pytest.MonkeyPatch, name: str, calls: int, error: BaseException) -> Iterator[None]:
    """Let so many calls of a method of the unfinished store pass, and raise `error` in the next."""
    plain, count = getattr(builder.StoreBuilder, name), iter(range(calls))

    def stopped(self: object, *arguments: object, **options: object) -> object:
        if next(count, None) is None:
            raise error
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builder.StoreBuilder, name, stopped)
        yield


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bad: bool) -> None:
    source = write(tmp_path / kind, some_texts(bad=bad))
    whole, record = build(source, Bytes(), bad_rows="quarantine", cache="whole")
    tokenizer = Bytes()
    for method, calls in (("add", 1), ("save", 7), ("add", 13), ("save", 20)):
        with stop_after(monkeypatch, method, calls, KilledError()), pytest.raises(KilledError):
            build(source, tokenizer, bad_rows="quarantine")
        assert [path.name.endswith(".tmp") for path in left(source)] == [True]
    store, resumed = build(source, tokenizer, bad_rows="quarantine")
    assert resumed == record
    assert content(store.prefix.parent) == content(whole.prefix.parent)
    once = Bytes()
    build(source, once, bad_rows="quarantine", cache="once")
    assert once.texts <= tokenizer.texts <= once.texts + 4 * 2, "at most the batch in flight is tokenised again"


@pytest.mark.parametrize("name", ["write_record", "remove_progress", "storage.os.rename"])
def test_killed_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nothing is tokenised again; also where there is no mask, which has been removed by then."""

    def kill(*_: object) -> None:
        raise KilledError

    for texts in (some_texts(bad=False), ["plain"] * 5):
        source = write(tmp_path / f"{len(texts)}.jsonl", texts)
        whole, _ = build(source, Bytes(), cache="whole")
        tokenizer = Bytes()
        with monkeypatch.context() as patch:
            patch.setattr(f"openchatkit.data.stores.build.{name}", kill)
            with pytest.raises(KilledError):
                build(source, tokenizer)
        count = tokenizer.texts
        store, _ = build(source, tokenizer)
        assert tokenizer.texts == count
        assert content(store.prefix.parent) == content(whole.prefix.parent)


CHILD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from openchatkit.data.stores.cache import cached_store
from openchatkit.data.stores.pace import Pace
from openchatkit.data.tokenizer import encoder
source, tokenizer, cache = map(Path, sys.argv[1:])
serialised = tokenizer.read_text()
tokenizer = SimpleNamespace(
    serialised=serialised,
    encode=encoder(serialised),
    vocab_size=384,
    end_of_text=0,
    end_of_text_token="<end>",
    digest="tiny",
)
pace = Pace(batch_bytes=500, alone_bytes=0, save_tokens=1)
cached_store(source, tokenizer=tokenizer, separator="end-of-text", bad_rows="quarantine", cache_dir=cache, pace=pace)
"""


def test_processes_killed_at_any_moment(tiny_tokenizer: Path, tmp_path: Path, quick_python: Path) -> None:
    generator = random.Random()
    source = write(tmp_path / "a.jsonl", some_texts(bad=True) * 150)
    command = [quick_python, "-c", CHILD, str(source), str(tiny_tokenizer / "tokenizer.json")]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    kills, row = 0, 0
    while kills < 4:
        with subprocess.Popen([*command, str(tmp_path / "cache")], stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and (now := saved_row(tmp_path / "cache")) <= row:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.05))
            child.kill()
        if child.returncode == 0:
            break
        kills, row = kills + 1, now
    assert kills >= 2
    subprocess.run([*command, str(tmp_path / "cache")], check=True)
    (whole,), (resumed,) = left(source, "whole"), left(source, "cache")
    assert content(resumed) == content(whole)


def saved_row(cache: Path) -> int:
    for path in cache.glob(".*.tmp/progress.json"):
        return json.loads(path.read_text())["row"]
    return 0


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was tokenised is kept, though no save was due, and the next build logs that it continues."""
    source = write(tmp_path / "a.jsonl", some_texts(bad=False))
    tokenizer = Bytes()
    with stop_after(monkeypatch, "add", 50, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        build(source, tokenizer, pace=NEVER)
    assert "a.jsonl: stopped; the same command continues after row 99" in capsys.readouterr().err
    count = tokenizer.texts
    assert build(source, tokenizer, pace=NEVER)[1].documents == ROWS
    assert tokenizer.texts < count + 40
    assert "a.jsonl: continues after row 99, where it was stopped" in capsys.readouterr().err


def test_progress_is_saved_after_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", some_texts(bad=False))
    with stop_after(monkeypatch, "add", 50, KilledError()), pytest.raises(KilledError):
        build(source, Bytes(), pace=replace(NEVER, save_seconds=0.0))
    assert saved_row(tmp_path / "cache") == 99


def test_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path) -> None:
    from openchatkit.data.tokenizer import Tokenizer

    source = write(tmp_path / "a.jsonl", some_texts(bad=False) * 5)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    pace = replace(OFTEN, alone_bytes=0)
    plain = builder.StoreBuilder.add

    def add(self: object, *arguments: object, **options: object) -> None:
        plain(self, *arguments, **options)
        os.kill(workers.multiprocessing.active_children()[0].pid, signal.SIGKILL)

    tokenizer = Tokenizer(tiny_tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(builder.StoreBuilder, "add", add)
        with pytest.raises(Interrupted, match="a worker process was killed"):
            build(source, tokenizer, pace=pace)
    assert saved_row(tmp_path / "cache") > 0
    assert build(source, tokenizer, pace=pace)[1].documents == 5 * ROWS


@pytest.mark.parametrize("calls", [0, 30])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    source = write(tmp_path / "a.jsonl", some_texts(bad=False))
    tokenizer = Bytes()
    with (
        stop_after(monkeypatch, "add", calls, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        pytest.raises(UserError, match=r"the disk is full: .* where it stopped"),
    ):
        build(source, tokenizer)
    assert [path.name.endswith(".tmp") for path in left(source)] == [True] * bool(calls)
    build(source, tokenizer)
    once = Bytes()
    build(source, once, cache="once")
    assert tokenizer.texts - once.texts <= 4, "at most the batch in flight is tokenised again"


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """A real refusal by the system, met when buffers are flushed; nothing gets a final name."""
    source = write(tmp_path / "a.jsonl", ["text " * 2000] * 10)
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from pathlib import Path
from test_build import Bytes, Pace, build, left
source = Path({str(source)!r})
try:
    build(source, Bytes(), pace=Pace())
except Exception as error:
    print(type(error).__name__, error)
print(left(source))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith(
        f"UserError cannot write tokens to {tmp_path / 'cache'}: the file size limit is reached"
    )
    assert result.stdout.endswith("[]\n")


def test_files_shorter_than_the_saved_progress_are_built_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build starts from scratch."""
    source = write(tmp_path / "a.jsonl", some_texts(bad=True))
    whole, _ = build(source, Bytes(), bad_rows="quarantine", cache="whole")
    for name in ("tokens.bin", "tokens.idx", "tokens.mask.bin", "quarantine.jsonl", "progress.json"):
        with stop_after(monkeypatch, "add", 50, KilledError()), pytest.raises(KilledError):
            build(source, Bytes(), bad_rows="quarantine")
        (folder,) = left(source)
        os.truncate(folder / name, 3)
        store, _ = build(source, Bytes(), bad_rows="quarantine")
        assert content(store.prefix.parent) == content(whole.prefix.parent)
        for path in [*store.prefix.parent.iterdir()]:
            path.unlink()
        store.prefix.parent.rmdir()


@pytest.mark.parametrize("when", ["at the end", "before a save"])
def test_a_source_changed_during_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """What came of two files under one key is not kept for a later build."""
    source = write(tmp_path / "a.jsonl", some_texts(bad=False))
    tokenizer = Bytes()
    encode = tokenizer.encode

    def change(texts: list[str]) -> list[list[int]]:
        if tokenizer.texts > ROWS:
            os.utime(source, ns=(0, 0))
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode", change)
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was tokenised"):
        build(source, tokenizer, pace=NEVER if when == "at the end" else OFTEN)
    assert left(source) == []


def test_a_source_changed_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process has the lock, say: the key is that of what it held before."""
    source = write(tmp_path / "a.jsonl", ["old"])
    old = source.read_bytes()
    plain = cache_module.content_hash

    def changing(*arguments: Path) -> str:
        found = plain(*arguments)
        write(source, ["another"])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "content_hash", changing)
        with pytest.raises(UserError, match=r"a\.jsonl was changed while it was tokenised"):
            build(source, Bytes())
    assert left(source) == []
    source.write_bytes(old)
    assert bytes(build(source, Bytes())[0].document(0)[:-1].tolist()) == b"old"


def test_a_source_removed_during_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", ["one"])
    tokenizer = Bytes()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts: source.unlink() or encode(texts))
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was tokenised"):
        build(source, tokenizer)


def test_source_that_may_not_be_read_is_not_the_caches_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", ["one"])

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    monkeypatch.setattr(cache_module, "hash_files", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied"):
        build(source, Bytes())


@pytest.mark.parametrize("listed", [None, "", "{", "[]", "{}"])
def test_quarantine_that_is_damaged(tmp_path: Path, listed: str | None) -> None:
    source = write(tmp_path / "a.jsonl", ["one", None])
    path = build(source, Bytes(), bad_rows="quarantine")[0].prefix.parent / "quarantine.jsonl"
    path.unlink() if listed is None else path.write_text(listed)
    with pytest.raises(UserError, match=r"quarantine\.jsonl is missing or damaged: delete .* and run again"):
        build(source, Bytes())


def test_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.jsonl"
    good = b'{"text": "<human>: a\\n<bot>: b\\n"}\n'
    bad = [b"\0", b"{", b"\xff", b'{"text": null}', b"{}", b'{"text": "a\\u0000"}', b"null", b"[]"]
    source.write_bytes(b"\n".join(bad) + b"\n\n" + good * 3)
    store, record = build(source, Bytes(), bad_rows="quarantine")
    assert (record.rows, record.documents, record.quarantined) == (11, 3, 8)
    assert (store.documents, record.trained_tokens) == (3, 12)
    listed = store.prefix.parent / "quarantine.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [(str(source), line) for line in range(1, 9)]
    assert rows[2]["reason"] == "byte 1 of the line is not UTF-8"
    log = f"a.jsonl: 8 of 11 rows set aside, listed in {listed}"
    assert log in capsys.readouterr().err
    build(source, Bytes(), bad_rows="quarantine")
    assert log in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON .*: mend or remove it, or pass --bad-rows quarantine"):
        build(source, Bytes())
    with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON .*: mend or remove it, or pass --bad-rows quarantine"):
        build(source, Bytes(), cache="another")


def test_a_line_too_long_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "ROW_LIMIT", 100)
    source = write(tmp_path / "a.jsonl", ["a", "b" * 200, "c"])
    with pytest.raises(UserError, match=r"a\.jsonl:3: longer than 16 MiB: mend"):
        build(source, Bytes())
    store, record = build(source, Bytes(), bad_rows="quarantine")
    assert (record.rows, record.quarantined, len(store.tokens)) == (3, 1, 4)


def test_quarantine_continues_after_a_bad_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*some_texts(bad=False), None])
    tokenizer = Bytes()
    with pytest.raises(UserError, match=r"a\.jsonl:121: expected 'text' to be a string"):
        build(source, tokenizer)
    count = tokenizer.texts
    assert build(source, tokenizer, bad_rows="quarantine")[1].quarantined == 1
    assert tokenizer.texts == count


def test_an_unfinished_quarantine_is_an_error_without_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", some_texts(bad=True))
    with stop_after(monkeypatch, "add", 30, KilledError()), pytest.raises(KilledError):
        build(source, Bytes(), bad_rows="quarantine")
    with pytest.raises(UserError, match=r"a\.jsonl:9: expected 'text' to be a string"):
        build(source, Bytes())


def test_nothing_but_bad_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [None, None])
    with pytest.raises(UserError, match=r"a\.jsonl: none of its 2 rows is a record; the first, row 1: expected 'text'"):
        build(source, Bytes(), bad_rows="quarantine")
    assert left(source) == []


def test_without_roles_there_is_no_mask(tmp_path: Path) -> None:
    store, record = build(write(tmp_path / "a.jsonl", ["one", "two"]), Bytes())
    assert (store.mask, record.trained_tokens) == (None, 0)
    assert sorted(content(store.prefix.parent)) == ["store.json", "tokens.bin", "tokens.idx"]


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("a.jsonl", lambda data: b"", r"a\.jsonl holds no records"),
        ("a.jsonl.gz", lambda data: data[:-5], "cut short or damaged after line"),
        ("a.jsonl.zst", lambda data: data[:-5], "cut short or damaged after line"),
        ("a.parquet", lambda data: data[:-5], "cut short"),
    ],
)
def test_damaged_sources_leave_nothing(
    tmp_path: Path, kind: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    source = write(tmp_path / kind, some_texts(bad=False))
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(UserError, match=message):
        build(source, Bytes(), bad_rows="quarantine")
    assert left(source) == []
