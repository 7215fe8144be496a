"""Tokens on disk: the memory-mapped `.bin/.idx` pair of Megatron and GPT-NeoX, byte for byte, and our mask beside it.

`<prefix>.bin` holds the raw tokens of every document, one after another. `<prefix>.idx`, little-endian throughout:

    magic "MMIDIDX\\0\\0" (9 bytes) | uint64 version 1 | uint8 dtype code | uint64 N | uint64 D
    int32 sizes[N] in tokens | int64 pointers[N] in bytes into .bin | int64 doc_idx[D], 0 first, one border a document

A document is one of the N sequences: GPT-NeoX's own training takes it so and never looks at `doc_idx`, which stores
merged by older tools do not even hold in full. `<prefix>.mask.bin`, where there is one, has a byte for every token:
TRAINED where it is part of a reply, EXCLUDED where it is never to be trained on, else CONTEXT. `<prefix>.tokenizer`
says which tokenizer made it, where that is known. `formats.store_writer` writes stores.
"""

import copy
import json
import struct
from pathlib import Path

import numpy as np

from openchatkit import storage
from openchatkit.errors import UserError

_MAGIC = b"MMIDIDX\0\0"
_LEGACY_MAGIC = b"TNTIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
HEADER_SIZE = _HEADER.size  # bytes of an index before its sizes
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CONTEXT, TRAINED, EXCLUDED = 0, 1, 2  # bytes of a mask
NOT_TRAINED = -100  # a label
_PIECE = 1 << 20  # documents whose places are compared at a time, so that memory stays flat
_UINT16_VOCABULARY = 65500  # vocabularies smaller than this are written as uint16, others as int32


def bin_path(prefix: Path) -> Path:
    """Return the path of the tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of sizes and pointers."""
    return prefix.with_name(prefix.name + ".idx")


def mask_path(prefix: Path) -> Path:
    """Return the path of the loss mask, which the store may lack."""
    return prefix.with_name(prefix.name + ".mask.bin")


def maker_path(prefix: Path) -> Path:
    """Return the path of what `write_maker` writes."""
    return prefix.with_name(prefix.name + ".tokenizer")


def find_prefix(path: Path) -> Path | None:
    """Return the prefix of the store that a path names, by itself or with the end of a file; None if there is none."""
    for end in ("", ".idx", ".bin", ".mask.bin", ".tokenizer"):
        name = path.name.removesuffix(end)
        if name and idx_path(path.with_name(name)).is_file():
            return path.with_name(name)
    return None


def write_maker(prefix: Path, maker: dict[str, str]) -> None:
    """Write beside a store which tokenizer made it, by GPT-NeoX's names: tokenizer_type, vocab_file, merge_file."""
    storage.write_text(maker_path(prefix), json.dumps(maker, indent=1) + "\n")


def read_maker(prefix: Path) -> dict[str, str]:
    """Return which tokenizer made a store; nothing where it is not known."""
    try:
        maker = json.loads(maker_path(prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return maker if isinstance(maker, dict) else {}


def choose_dtype(vocab_size: int) -> np.dtype:
    """Return the type that GPT-NeoX writes the ids of a vocabulary in."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCABULARY else "<i4")


def pack_header(dtype: np.dtype, documents: int) -> bytes:
    """Return the first `HEADER_SIZE` bytes of an index, where each document is a sequence."""
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    return _HEADER.pack(_MAGIC, 1, code, documents, documents + 1)


class LabelMask:
    """The mask that labels [T] stand for: an array of the same length, of which only the places asked for are made."""

    def __init__(self, labels: np.ndarray) -> None:
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        return np.where(self._labels[places] == NOT_TRAINED, CONTEXT, TRAINED).astype(np.uint8)


class TokenStore:
    """A store opened by memory map. Arrays are read-only:

    tokens [T] in the store's own integer type; mask uint8 [T], or a LabelMask of as many, or None; sizes int32 [N];
    pointers int64 [N], in bytes. Opening reads the header and the last document's place, not the documents. UserError
    when a file is missing, cut, or of another format.
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
        self.mask: np.ndarray | LabelMask | None = None
        if mask_path(self.prefix).exists():
            self.mask = _map_bytes(mask_path(self.prefix))
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

    def find_index_damage(self) -> str | None:
        """Return the first document that does not begin where the one before it ends, in one line, or None.

        All that write stores have them so. Of a `part`, documents are counted from its first.
        """
        end = self._first_token
        for low in range(0, self.documents, _PIECE):
            sizes = self.sizes[low : low + _PIECE].astype(np.int64)
            if len(wrong := np.flatnonzero(sizes < 0)):
                return f"{idx_path(self.prefix)}: document {low + wrong[0]} has {sizes[wrong[0]]} tokens"
            ends = end + np.cumsum(sizes)
            expected = (ends - sizes) * self.tokens.itemsize
            if len(wrong := np.flatnonzero(self.pointers[low : low + _PIECE] != expected)):
                place = wrong[0]
                return (
                    f"{idx_path(self.prefix)}: document {low + place} begins at byte {self.pointers[low + place]}, "
                    f"expected {expected[place]}"
                )
            end = int(ends[-1])
        return None

    def locate(self, place: int) -> tuple[int, int]:
        """Return the document that holds a place in `tokens`, and the token's number in it."""
        starts = self.starts(np.arange(self.documents))
        document = int(np.flatnonzero((starts <= place) & (place < starts + self.sizes))[0])
        return document, place - int(starts[document])

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
