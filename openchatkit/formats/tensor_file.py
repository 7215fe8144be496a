"""Safetensors files as streams of bytes: read and written piece by piece, whatever the size of their tensors.

A file is eight bytes (length of the header, little-endian), the header (JSON: dtype, shape and byte range of every
tensor), and the tensors' bytes (github.com/huggingface/safetensors#format). Files written here put wide elements
first, so that every tensor is aligned when the file is memory-mapped.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from openchatkit.formats.manifest import DamagedError, FileRecord
from openchatkit.storage import atomic_path, storage_errors

CHUNK = 1 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file's header: `specs` by name, in the order of the bytes, and `metadata`.

    DamagedError when the file is missing, cut or not a safetensors file.
    """

    mapped = True

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = path.stat().st_size
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(_MAX_HEADER, size - 8):
                    raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items())
            self.specs = {
                name: TensorSpec(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])) for *_, name in ranges
            }
            self._starts: dict[str, int] = {}
            position = 0
            for begin, end, name in ranges:
                if begin != position or end - begin != self.specs[name].nbytes:
                    raise ValueError(f"the bytes of {name} are not where they should be")
                self._starts[name], position = 8 + length + begin, end
            if 8 + length + position != size:
                raise ValueError(f"{8 + length + position:,} bytes expected, {size:,} found")
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise DamagedError(f"{path} is not a whole safetensors file: {error}") from error

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces of at most CHUNK; each piece is valid until the next is asked for."""
        left = self.specs[name].nbytes
        buffer = memoryview(bytearray(min(CHUNK, left)))
        with open(self.path, "rb") as file:
            file.seek(self._starts[name])
            while left:
                count = file.readinto(buffer[: min(CHUNK, left)])
                if not count:
                    raise DamagedError(f"{self.path} was cut while it was read")
                yield buffer[:count]
                left -= count

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors on the CPU whose memory is the file's, copied page by page only where they are written to."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}


def write_stream(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[memoryview]],
    *,
    metadata: Mapping[str, str] | None = None,
    hashed: bool = True,
) -> FileRecord:
    """Write a safetensors file atomically from `chunks(name)`, called once a tensor in the order of the file.

    Return its record; the bytes are hashed as they are written, unless `hashed` is false: then the hash is empty.
    UserError when the disk refuses them.
    """
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in names:
        end = position + specs[name].nbytes
        code = _CODES[specs[name].dtype]
        header[name] = {"dtype": code, "shape": list(specs[name].shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256() if hashed else None, 0
    with storage_errors(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
        for piece in _pieces(text, names, specs, chunks):
            if digest:
                digest.update(piece)
            file.write(piece)
            size += len(piece)
    return FileRecord(path.name, size, digest.hexdigest() if digest else "")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write tensors in memory, on any device, as `write_stream`; one at a time is copied to the CPU."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_stream(path, specs, lambda name: [tensor_bytes(tensors[name])], metadata=metadata)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, flat, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def cast(chunks: Iterable[memoryview], source: torch.dtype, target: torch.dtype) -> Iterator[memoryview]:
    """Yield the same numbers in another dtype, piece by piece; OverflowError when a finite number becomes infinite."""
    for chunk in chunks:
        before = torch.frombuffer(chunk, dtype=source)
        after = before.to(target)
        # One pass shows that all is finite, as it nearly always is; only otherwise are the two compared.
        if not torch.stack(after.aminmax()).isfinite().all() and not torch.equal(before.isinf(), after.isinf()):
            raise OverflowError(f"values up to {before[torch.isfinite(before)].abs().max().item():g}")
        yield tensor_bytes(after)


def _pieces(
    header: bytes,
    names: Iterable[str],
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[memoryview]],
) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for name in names:
        written = 0
        for chunk in chunks(name):
            yield chunk
            written += len(chunk)
        assert written == specs[name].nbytes, (name, written, specs[name])
