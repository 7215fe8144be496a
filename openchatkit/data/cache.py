"""Token stores that are made once: where they are kept, under which key, and by which of several processes.

The key is the SHA-256 of a source's bytes, the tokenizer's digest, the separator, and the version of the
tokenising code. A moved or touched file therefore finds its store again and an edited one never does. Reading 100 GB
for their hash takes minutes, so a hash is remembered under the file's path, size and time of change.

Every rank of a run may ask at once: a file lock lets one build while the others wait. A store is built in a temporary
folder and renamed when it is whole; what a killed build leaves behind is removed by the next one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from openchatkit import paths, progress
from openchatkit.data.records import Records
from openchatkit.data.tokenise import VERSION, tokenise_all
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats.token_store import (
    StoreRecord,
    TokenStore,
    TokenStoreWriter,
    folder_prefix,
    read_record,
    write_record,
)

# A file changed again within one tick of its file system's clock looks unchanged, so fresh hashes are not remembered.
_SETTLED_SECONDS = 2.0
_LARGE = 5 << 30  # bytes whose reading is worth a line in the log


def cached_store(
    source: Path, *, tokenizer: Tokenizer, separator: str, bad_rows: str, cache_dir: Path
) -> tuple[TokenStore, StoreRecord]:
    """The store of one file of records, built if it is not there yet.

    UserError: a record that cannot be read (file and line), a full disk, a cache that cannot be written or is damaged.
    """
    cache_dir = Path(cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        key = _key(content_hash(source, cache_dir), tokenizer, separator)
        folder = cache_dir / f"{source.name.split('.')[0][:60]}-{key[:16]}"
        if read_record(folder) is None:
            with _locked(folder, f"{source} is tokenised by another process: waiting for it"):
                if read_record(folder) is None:
                    _build(source, folder, key=key, tokenizer=tokenizer)
    except OSError as error:
        raise _explained(error, cache_dir) from error
    record = read_record(folder)
    assert record is not None
    return TokenStore(folder_prefix(folder)), record


def content_hash(source: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's bytes, remembered for as long as its path, size and time of change stay the same."""
    stat = source.stat()
    known = {"path": str(source.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memory = cache_dir / "hashes" / f"{hashlib.sha256(known['path'].encode()).hexdigest()[:32]}.json"
    if digest := _remembered(memory, known):
        return digest
    with _locked(memory, f"{source} is read by another process: waiting for it"):
        if digest := _remembered(memory, known):
            return digest
        if stat.st_size > _LARGE:
            logger.info("reading all {:.0f} GB of {} once, for its hash", stat.st_size / 1e9, source)
        digest = paths.sha256(source)
        if time.time() - stat.st_mtime > _SETTLED_SECONDS:
            paths.write_text(memory, json.dumps(known | {"sha256": digest}) + "\n")
    return digest


def _remembered(memory: Path, known: dict[str, object]) -> str | None:
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        return record["sha256"] if known.items() <= record.items() else None
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return None


def _key(content: str, tokenizer: Tokenizer, separator: str) -> str:
    decides = {"version": VERSION, "content": content, "tokenizer": tokenizer.digest, "separator": separator}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _build(source: Path, folder: Path, *, key: str, tokenizer: Tokenizer) -> None:
    """Tokenise `source` into `folder`, which appears only when it is complete. The caller holds the lock."""
    before = source.stat()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    prefix = folder_prefix(temporary)
    try:
        with (
            Records(source) as records,
            TokenStoreWriter(prefix, vocab_size=tokenizer.vocab_size, masked=True) as writer,
            progress.bar(source.stat().st_size, f"tokenising {source.name}", unit="B", unit_scale=True) as bar,
        ):
            for part in tokenise_all((text for _, text in records), tokenizer):
                writer.add(part.tokens, part.sizes, part.mask)
                bar.update(records.position - bar.n)
        if (source.stat().st_size, source.stat().st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(f"{source} was changed while it was tokenised: run again when it is complete")
        write_record(temporary, StoreRecord(str(source), key, writer.documents, writer.tokens, writer.trained_tokens))
        for path in temporary.iterdir():
            paths.sync(path)
        os.rename(temporary, folder)
        paths.sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("tokenised {}: {} documents, {} tokens", source, writer.documents, writer.tokens)


@contextlib.contextmanager
def _locked(target: Path, waiting: str) -> Iterator[None]:
    """Hold the lock that belongs to `target`; the system frees it when its holder dies, however it dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _explained(error: OSError, cache_dir: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full: tokens are kept in {cache_dir}, make room there and run again")
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
        return UserError(f"the file system of {cache_dir} has no file locks: keep the token cache on another one")
    place = f"{error.filename}: " if error.filename else ""
    return UserError(f"tokens cannot be kept in {cache_dir}: {place}{error.strerror or error}")
