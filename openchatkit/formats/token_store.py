"""Tokens on disk: the memory-mapped `.bin/.idx` pair of Megatron and GPT-NeoX, byte for byte, and our mask beside it.

`<prefix>.bin` holds the raw tokens of every document, one after another. `<prefix>.idx`, little-endian throughout:

    magic "MMIDIDX\\0\\0" (9 bytes) | uint64 version 1 | uint8 dtype code | uint64 N | uint64 D
    int32 sizes[N] in tokens | int64 pointers[N] in bytes into .bin | int64 doc_idx[D], 0 first, one border a document

A document is one of the N sequences: GPT-NeoX's own training takes it so and never looks at `doc_idx`, which stores
merged by older tools do not even hold in full. `<prefix>.mask.bin`, where there is one, has a byte for every token:
TRAINED where it is part of a reply, EXCLUDED where it is never to be trained on, else CONTEXT. A cached store is a
folder with such a set of files and `store.json`, its record; rows that were set aside are in `quarantine.jsonl`. While
it is built, `progress.json` says how far the files are known to be on disk.
"""

import contextlib
import copy
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from openchatkit import storage
from openchatkit.errors import UserError

_MAGIC = b"MMIDIDX\0\0"
_LEGACY_MAGIC = b"TNTIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CONTEXT, TRAINED, EXCLUDED = 0, 1, 2  # bytes of a mask
_UINT16_VOCABULARY = 65500  # vocabularies smaller than this are written as uint16, others as int32
_PIECE = 1 << 20  # documents indexed at a time when a store is closed, so that memory stays flat

_FOLDER_PREFIX = "tokens"
_RECORD = "store.json"
_PROGRESS = "progress.json"
_MAKER = ".tokenizer"
_QUARANTINE = "quarantine.jsonl"


def bin_path(prefix: Path) -> Path:
    """Return the path of the tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of sizes and pointers."""
    return prefix.with_name(prefix.name + ".idx")


def mask_path(prefix: Path) -> Path:
    """Return the path of the loss mask, which the store may lack."""
    return prefix.with_name(prefix.name + ".mask.bin")


def find_prefix(path: Path) -> Path | None:
    """Return the prefix of the store that a path names, with or without the suffix of a file; None if there is none."""
    for prefix in (path, path.with_suffix("") if path.suffix in (".idx", ".bin") else path):
        if path.name and idx_path(prefix).is_file():
            return prefix
    return None


def write_maker(prefix: Path, maker: dict[str, str]) -> None:
    """Write beside a store which tokenizer made it, by GPT-NeoX's names: tokenizer_type, vocab_file, merge_file."""
    storage.write_text(prefix.with_name(f"{prefix.name}{_MAKER}"), json.dumps(maker, indent=1) + "\n")


def read_maker(prefix: Path) -> dict[str, str]:
    """Return which tokenizer made a store; nothing where it is not known."""
    try:
        maker = json.loads(prefix.with_name(f"{prefix.name}{_MAKER}").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return maker if isinstance(maker, dict) else {}


def folder_prefix(folder: Path) -> Path:
    """Return the prefix of the store in a cached store's folder."""
    return folder / _FOLDER_PREFIX


def quarantine_path(folder: Path) -> Path:
    """Return the path of the rows set aside, {"file", "line", "reason"} each; there is no file when there are none."""
    return folder / _QUARANTINE


@dataclass(frozen=True)
class StoreRecord:
    """Source and contents of a cached store. Every row of the source is a document or in quarantine.

    Of its mask, `trained_tokens` and `excluded_tokens` count the bytes TRAINED and EXCLUDED; where there are none of
    either, there is no mask. `untrained` counts the documents without a token of the first kind, `spelled` those whose
    text has the end-of-text token in it, as characters.
    """

    source: str
    key: str
    rows: int
    documents: int
    quarantined: int
    tokens: int
    trained_tokens: int
    excluded_tokens: int = 0
    untrained: int = 0
    spelled: int = 0


@dataclass(frozen=True)
class StoreProgress:
    """How far a store's files are known to be on disk; more may have been appended since.

    `row`, `row_end`: the position in the source after the last row taken in; `position`: bytes of it that were read;
    `quarantine_size`: bytes of `quarantine.jsonl`.
    """

    rows: int = 0
    row: int = 0
    row_end: int = 0
    position: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    excluded_tokens: int = 0
    untrained: int = 0
    spelled: int = 0
    quarantined: int = 0
    quarantine_size: int = 0


def write_record(folder: Path, record: StoreRecord) -> None:
    """Write `store.json`: the last file of a cached store."""
    assert record.rows == record.documents + record.quarantined, record
    storage.write_text(folder / _RECORD, json.dumps(asdict(record), indent=1) + "\n")


def read_record(folder: Path) -> StoreRecord | None:
    """Read the record of a cached store; None where there is no such store, UserError where it cannot be read."""
    path = folder / _RECORD
    try:
        return StoreRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} and run again, it is made again") from error


def write_progress(folder: Path, progress: StoreProgress) -> None:
    """Write `progress.json`: the files have been synced up to this point."""
    storage.write_text(folder / _PROGRESS, json.dumps(asdict(progress)) + "\n")


def read_progress(folder: Path) -> StoreProgress | None:
    """Read the progress of an unfinished store; None where it is not known."""
    try:
        return StoreProgress(**json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def remove_progress(folder: Path) -> None:
    """Remove `progress.json`: the store is whole."""
    (folder / _PROGRESS).unlink(missing_ok=True)


class TokenStoreWriter:
    """Writes a store document by document; memory does not grow with their number.

    The index has no valid header before `close`, so an unfinished store cannot be opened. `resume` continues files that
    hold at least that much and drops the rest. ValueError: they hold less.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, masked: bool, resume: StoreProgress | None = None) -> None:
        start = resume or StoreProgress()
        self.documents = start.documents
        self.tokens = start.tokens
        self.trained_tokens = start.trained_tokens
        self.excluded_tokens = start.excluded_tokens
        self.untrained = start.untrained
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._code = 8 if vocab_size < _UINT16_VOCABULARY else 4
        self._dtype = np.dtype(_DTYPES[self._code])
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files: list[BinaryIO] = []
        try:
            self._bin = self._open(bin_path(prefix), self.tokens * self._dtype.itemsize)
            self._idx = self._open(idx_path(prefix), _HEADER.size + 4 * self.documents if resume else 0)
            # A mask that is all zeros may have been removed already.
            self._mask = self._open(mask_path(prefix), self.tokens, grow=not self._marked) if masked else None
        except BaseException:
            self._release()
            raise
        self._idx.seek(0)
        self._idx.write(bytes(_HEADER.size))
        self._idx.seek(0, 2)

    @property
    def _marked(self) -> int:
        """Number of bytes of the mask that are not zero."""
        return self.trained_tokens + self.excluded_tokens

    def _open(self, path: Path, size: int, *, grow: bool = False) -> BinaryIO:
        """Open a file, keep `size` bytes of it, and seek to their end."""
        file = open(path, "r+b" if size and path.exists() else "w+b")  # noqa: SIM115 (closed by `close`)
        self._files.append(file)
        if file.seek(0, 2) < size and not grow:
            raise ValueError(f"{path} holds less than {size} bytes")
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, tokens: np.ndarray, sizes: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append documents: their tokens one after another, each one's size, and the mask's byte of every token."""
        assert int(sizes.sum()) == len(tokens), (int(sizes.sum()), len(tokens))
        assert len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < self._vocab_size), "token id out of range"
        self._bin.write(tokens.astype(self._dtype).data)
        self._idx.write(sizes.astype("<i4").data)
        if self._mask is not None:
            assert mask is not None
            assert mask.shape == tokens.shape, (mask.shape, tokens.shape)
            self._mask.write(mask.astype("<u1").data)
            trained = mask == TRAINED
            self.trained_tokens += int(np.count_nonzero(trained))
            self.excluded_tokens += int(np.count_nonzero(mask == EXCLUDED))
            before = np.concatenate([[0], np.cumsum(trained)])
            ends = np.cumsum(sizes)
            self.untrained += int(np.count_nonzero(before[ends] == before[ends - sizes]))
        self.documents += len(sizes)
        self.tokens += len(tokens)

    def sync(self) -> None:
        """Force to disk what was added."""
        for file in self._files:
            storage.sync_file(file)

    def close(self) -> None:
        """Write pointers, document borders and, last, the header; a mask of zeros is removed."""
        offset = 0
        for first in range(0, self.documents, _PIECE):
            self._idx.seek(_HEADER.size + 4 * first)
            count = min(_PIECE, self.documents - first)
            ends = np.cumsum(np.frombuffer(self._idx.read(4 * count), "<i4"), dtype=np.int64)
            starts = offset + np.concatenate([[0], ends[:-1]])
            offset += int(ends[-1])
            self._idx.seek(_HEADER.size + 4 * self.documents + 8 * first)
            self._idx.write((starts * self._dtype.itemsize).astype("<i8").data)
        self._idx.seek(0, 2)
        for first in range(0, self.documents + 1, _PIECE):
            self._idx.write(np.arange(first, min(first + _PIECE, self.documents + 1), dtype="<i8").data)
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(_MAGIC, 1, self._code, self.documents, self.documents + 1))
        self._release()
        if self._mask is not None and not self._marked:
            mask_path(self._prefix).unlink()

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # of a full disk, say, which the error in flight reports
                self._release()

    def _release(self) -> None:
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)


class TokenStore:
    """A store opened by memory map. Arrays are read-only:

    tokens [T] in the store's own integer type; mask uint8 [T] or None; sizes int32 [N]; pointers int64 [N], in bytes.
    Opening reads the header and the last document's place, not the documents. UserError when a file is missing, cut,
    or of another format.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        index = _map_bytes(idx_path(self.prefix))
        dtype, documents, borders = _read_header(idx_path(self.prefix), index)
        expected = _HEADER.size + 12 * documents + 8 * borders
        if len(index) != expected:
            raise UserError(_cut(idx_path(self.prefix), len(index), expected))
        self.documents = documents
        self.sizes = np.frombuffer(index, "<i4", documents, _HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", documents, _HEADER.size + 4 * documents)
        content = _map_bytes(bin_path(self.prefix))
        end = int(self.pointers[-1]) + int(self.sizes[-1]) * dtype.itemsize if documents else 0
        if len(content) != end:
            raise UserError(_cut(bin_path(self.prefix), len(content), end))
        self.tokens = np.frombuffer(content, dtype)
        self.mask = _map_bytes(mask_path(self.prefix)) if mask_path(self.prefix).exists() else None
        if self.mask is not None and len(self.mask) != len(self.tokens):
            raise UserError(_cut(mask_path(self.prefix), len(self.mask), len(self.tokens)))
        self._first_token = 0

    def part(self, first: int, last: int) -> "TokenStore":
        """Return the store of documents `first` to `last` (exclusive) alone; UserError where it has no such documents.

        Nothing is copied. `pointers` still count from the beginning of the file.
        """
        if not 0 <= first < last <= self.documents:
            raise UserError(f"{self.prefix}[{first}:{last}]: the store has documents 0 to {self.documents}")
        begin = self.starts(np.array([first]))[0]
        end = self.starts(np.array([last]))[0] if last < self.documents else len(self.tokens)
        part = copy.copy(self)
        part.documents = last - first
        part.sizes, part.pointers = self.sizes[first:last], self.pointers[first:last]
        part.tokens = self.tokens[begin:end]
        part.mask = None if self.mask is None else self.mask[begin:end]
        part._first_token = self._first_token + int(begin)
        return part

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """Return the positions in `tokens` at which these documents begin, int64."""
        positions: np.ndarray = self.pointers[documents] // self.tokens.itemsize - self._first_token
        return positions

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document."""
        start = int(self.starts(np.array([number]))[0])
        return self.tokens[start : start + int(self.sizes[number])]


def _read_header(path: Path, index: np.ndarray) -> tuple[np.dtype, int, int]:
    """Return the tokens' type, the number of sequences and of document borders."""
    head = bytes(index[: _HEADER.size])
    if head.startswith(_LEGACY_MAGIC):
        raise UserError(f"{path} is in Megatron's old `cached` format: preprocess it again with --dataset-impl mmap")
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise UserError(f"{path} is no token index: expected it to begin with {_MAGIC!r}, found {head[:9]!r}")
    _, version, code, documents, borders = _HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{path} is a token index of version {version}: only version 1 can be read")
    if code not in _DTYPES:
        raise UserError(f"{path} has dtype code {code}: expected one for whole numbers, {sorted(_DTYPES)}")
    return np.dtype(_DTYPES[code]), documents, borders


def _map_bytes(path: Path) -> np.ndarray:
    try:
        # An empty file cannot be mapped; the plain array spares every later slice the cost of np.memmap's own class.
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: a token store is a .bin and an .idx file of one name") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _cut(path: Path, found: int, expected: int) -> str:
    return f"{path} holds {found} bytes where {expected} belong: it is cut or altered, make the store again"
