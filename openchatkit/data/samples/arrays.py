"""Arrays that a source needs for an epoch: in memory while they are small, else in memory-mapped files.

A file is a .npy array followed by the CRC-32 of its values. It is built under a lock, in a temporary file that is
renamed when it is whole, so of several processes one builds and the others wait; a damaged one is built again. The
process that builds an epoch's arrays deletes those of epochs before the previous one. All of them can be made again
from the data: the folder may be deleted whenever no run uses it.
"""

import io
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from loguru import logger

from openchatkit import storage

IN_MEMORY = 1 << 20  # up to so many documents or rows, nothing is written
CHUNK = 1 << 18  # how many of them are processed at a time
_LARGE = 1 << 24  # so many values take seconds to make, so that is logged
_EPOCH = re.compile(r"-epoch-(\d+)\.npy$")


class Arrays:
    """Arrays of a source of `size` documents, kept in `folder` where these or an array's values exceed `in_memory`."""

    def __init__(self, folder: Path, size: int, *, in_memory: int = IN_MEMORY) -> None:
        self._folder = folder
        self._size = size
        self._in_memory = in_memory

    def make(
        self,
        name: str,
        epoch: int | None,
        length: int,
        dtype: np.dtype,
        pieces: Iterable[np.ndarray],
        alter: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Return the array `name` [length] of an epoch, or of all: `pieces` in sequence, changed in place by `alter`.

        Neither is used when the array exists already. `pieces` and `alter` must not call `make`.
        UserError: a full disk, a folder that cannot be written.
        """
        dtype = np.dtype(dtype)
        if max(length, self._size) <= self._in_memory or not length:
            array, filled = np.empty(length, dtype), 0
            for piece in pieces:
                array[filled : filled + len(piece)] = piece
                filled += len(piece)
            assert filled == length, (name, filled, length)
            if alter:
                alter(array)
            return array
        file = _File(self._folder / (f"{name}.npy" if epoch is None else f"{name}-epoch-{epoch}.npy"), length, dtype)
        with storage.storage_errors(f"the order of the data to {self._folder} (--data-cache)", every=True):
            found = file.open()
            return self._build(file, epoch, pieces, alter) if found is None else found

    def _build(
        self, file: "_File", epoch: int | None, pieces: Iterable[np.ndarray], alter: Callable[[np.ndarray], None] | None
    ) -> np.ndarray:
        with storage.hold_lock(
            storage.lock_path(self._folder), f"{file.path} is built by another process: waiting for it"
        ):
            if (array := file.open()) is not None:
                return array
            if file.path.exists():
                logger.warning("{} is damaged: building it again", file.path)
            if file.length > _LARGE:
                logger.info("building {}: {:,} numbers", file.path, file.length)
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = replace(file, path=file.path.with_name(f".{file.path.name}.tmp"))
            try:
                temporary.write(pieces, alter)
                # Mapped under its temporary name: from then on no other process can delete it by tidying.
                array = temporary.open()
                assert array is not None, temporary
                storage.replace_file(temporary.path, file.path)
            finally:
                temporary.path.unlink(missing_ok=True)
            if epoch is not None:
                _tidy(self._folder, epoch - 1)
        return array


@dataclass(frozen=True)
class _File:
    """An array of `length` in a file: a .npy header, the values, their checksum."""

    path: Path
    length: int
    dtype: np.dtype

    def open(self) -> np.ndarray | None:
        """Map the array; None when the file is missing, or does not hold exactly this array."""
        header = self._header()
        end = len(header) + self.length * self.dtype.itemsize
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != end + 4 or file.read(len(header)) != header:
                    return None
                array = np.asarray(np.memmap(file, self.dtype, "r", len(header), (self.length,)))
                file.seek(end)
                return array if file.read(4) == _checksum(array) else None
        except FileNotFoundError:
            return None

    def write(self, pieces: Iterable[np.ndarray], alter: Callable[[np.ndarray], None] | None) -> None:
        """Write the pieces, change them in place, and force all to disk."""
        # All bytes are written before any is mapped: a full disk is then an error, where a mapped write would be fatal.
        with open(self.path, "wb") as file:
            start = file.write(self._header())
            for piece in pieces:
                file.write(np.ascontiguousarray(piece, self.dtype).data)
            end = file.tell()
            assert end == start + self.length * self.dtype.itemsize, (self, start, end)
            file.write(bytes(4))
        array = np.memmap(self.path, self.dtype, "r+", start, (self.length,))
        if alter:
            alter(np.asarray(array))
            array.flush()
        with open(self.path, "r+b") as file:
            file.seek(end)
            file.write(_checksum(np.asarray(array)))
        storage.sync(self.path)

    def _header(self) -> bytes:
        file = io.BytesIO()
        description = np.lib.format.dtype_to_descr(self.dtype)
        array = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(file, array)
        return file.getvalue()


def _checksum(array: np.ndarray) -> bytes:
    return zlib.crc32(array.view(np.uint8).data).to_bytes(4, "little")


def _tidy(folder: Path, oldest: int) -> None:
    """Delete the arrays of epochs before `oldest`; a process that has one mapped keeps it until it is unmapped."""
    for path in folder.iterdir():
        if (match := _EPOCH.search(path.name)) and int(match[1]) < oldest:
            path.unlink(missing_ok=True)
