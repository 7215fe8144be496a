"""The cache of token stores: where they are kept, under which key, and which of several processes builds one.

The key is the SHA-256 of a source's bytes, the tokenizer's digest, the separator, and the version of the tokenising
code. A moved or touched file therefore finds its store again and an edited one never does. Reading 100 GB for a hash
takes minutes, so hashes are kept for as long as the files keep their stamps (`storage.stamp`).

Every rank of a run may ask at once: a file lock lets one build (`data.stores.build`) while the others wait.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from openchatkit import progress, storage
from openchatkit.data.records import reader
from openchatkit.data.stores.build import build_store, first_quarantined
from openchatkit.data.stores.pace import Pace
from openchatkit.data.stores.tokenise import VERSION
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats.cached_store import StoreRecord, folder_prefix, quarantine_path, read_record
from openchatkit.formats.token_store import TokenStore, bin_path, idx_path, mask_path

LARGE_BYTES = 5 << 30  # bytes that take long enough to read for a progress bar
PIECE_BYTES = 1 << 20
_PLACES, _SHORT = 1024, 1 << 12


def cached_store(
    source: Path,
    *,
    tokenizer: Tokenizer,
    separator: str,
    bad_rows: str,
    cache_dir: Path,
    pace: Pace = Pace(),  # noqa: B008 - it is frozen
) -> tuple[TokenStore, StoreRecord]:
    """Return the store of one file of records, built if it is missing, with a mask where any row has roles.

    UserError: a record that cannot be read (file and line), a full disk, a cache that cannot be written or is damaged.
    """
    source, cache_dir = Path(source), Path(cache_dir)
    with storage.storage_errors(f"tokens to {cache_dir}", "it continues where it stopped", every=True):
        cache_dir.mkdir(parents=True, exist_ok=True)
        stamps = _stamps(source)
        key = _key(content_hash(source, cache_dir), tokenizer, separator)
        folder = _folder(cache_dir, source, key)
        if (record := read_record(folder)) is None:
            with storage.hold_lock(
                storage.lock_path(folder), f"{source} is tokenised by another process: waiting for it"
            ):
                if read_record(folder) is None:
                    build_store(
                        source,
                        folder,
                        stamps=stamps,
                        key=key,
                        tokenizer=tokenizer,
                        separator=separator,
                        bad_rows=bad_rows,
                        pace=pace,
                    )
            record = read_record(folder)
            assert record is not None
            logger.info("tokenised {}: {:,} documents, {:,} tokens", source, record.documents, record.tokens)
        if record.quarantined and bad_rows == "error":
            raise first_quarantined(source, folder)
    if record.quarantined:
        listed = quarantine_path(folder)
        logger.warning("{}: {:,} of {:,} rows set aside, listed in {}", source, record.quarantined, record.rows, listed)
    if record.spelled:
        logger.warning(
            "{}: {:,} of {:,} documents have {} in their text, which is learnt as characters: take it out, the end of "
            "a document is added automatically",
            source,
            record.spelled,
            record.documents,
            tokenizer.end_of_text_token,
        )
    return TokenStore(folder_prefix(folder)), record


def _folder(cache_dir: Path, source: Path, key: str) -> Path:
    """Return the folder of the store with this key, under any name of its source; or the one to build it in."""
    existing = (folder for folder in sorted(cache_dir.glob(f"*-{key[:16]}")) if read_record(folder))
    return next(existing, cache_dir / f"{source.name.split('.')[0][:60]}-{key[:16]}")


def store_identity(prefix: Path, cache_dir: Path) -> str:
    """Return a digest of a store that was made elsewhere: of its whole index, and of samples of its other files.

    Arrays that are kept under this name follow from the index, and in GPT-NeoX's order from which documents the mask
    trains on. Of tokens and mask it takes the sizes, the first and last MiB and a thousand pieces between, so that a
    store of a terabyte opens in a second. A small edit between these is not noticed: the warning of data changed since
    a checkpoint is missing then, and a document that the edit begins or ends to train on stays where it was.
    """
    digest = hashlib.sha256(content_hash(idx_path(prefix), cache_dir).encode())
    for path in (bin_path(prefix), mask_path(prefix)):
        digest.update(_sample_hash(path) if path.exists() else b"none")
    return digest.hexdigest()


def _sample_hash(path: Path) -> bytes:
    """Return the SHA-256 of a file's size, its first and last MiB, and pieces of it between."""
    with _reading(path), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        last = max(size - PIECE_BYTES, 0)
        between = () if last <= PIECE_BYTES else (last * place // _PLACES for place in range(1, _PLACES))
        for start, length in ((0, PIECE_BYTES), *((start, _SHORT) for start in between), (last, PIECE_BYTES)):
            file.seek(start)
            digest.update(file.read(length))
    return digest.digest()


def content_hash(source: Path, cache_dir: Path) -> str:
    """Return the SHA-256 of a source's bytes, kept for as long as its path, sizes and times of change are the same."""
    stamps = _stamps(source)
    path = str(source.resolve())
    known: dict[str, object] = {"path": path, "files": [[name, *stamp] for name, stamp in stamps]}
    memory = cache_dir / "hashes" / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"
    if digest := _read_hash(memory, known):
        return digest
    with storage.hold_lock(storage.lock_path(memory), f"{source} is read by another process: waiting for it"):
        if digest := _read_hash(memory, known):
            return digest
        with _reading(source):
            digest = hash_files(source, sum(size for _, (size, *_) in stamps))
        if all(storage.is_settled(stamp) for _, stamp in stamps):
            storage.write_text(memory, json.dumps(known | {"sha256": digest}) + "\n")
    return digest


def _stamps(source: Path) -> reader.Stamps:
    with _reading(source):
        return reader.stamps(source)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Report errors of the system as the source's, not as the cache's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error


def hash_files(source: Path, size: int) -> str:
    """Return the SHA-256 of a file's bytes, or of the names, sizes and bytes of a folder's files."""
    digest = hashlib.sha256()
    buffer = bytearray(PIECE_BYTES)
    title = f"reading {source.name} once, for its hash"
    with progress.bar(size, title, unit="B", unit_scale=True, disable=None if size > LARGE_BYTES else True) as bar:
        for path in reader.files(source):
            if path != source:
                digest.update(f"{path.relative_to(source)} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while count := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:count])
                    bar.update(count)
    return digest.hexdigest()


def _read_hash(memory: Path, known: dict[str, object]) -> str | None:
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        return record["sha256"] if known.items() <= record.items() else None
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return None


def _key(content: str, tokenizer: Tokenizer, separator: str) -> str:
    decides = {"version": VERSION, "content": content, "tokenizer": tokenizer.digest, "separator": separator}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
