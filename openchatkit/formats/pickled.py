"""Pickled tensors of other programs (`torch.save`), read without running code in them and without filling memory."""

import ctypes
import mmap
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from openchatkit.formats.manifest import DamagedError
from openchatkit.formats.tensor_file import CHUNK, TensorSpec, tensor_bytes


class _Dropped:
    """Placeholder of an object that is no tensor: it holds nothing and does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Dropped":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass


class PickledFile:
    """A pickled dict of tensors by name, with the interface of a TensorFile.

    With `entry` the tensors are that entry of the dict, and whatever else the file holds is dropped: settings, an
    optimizer, the state of random generators. There are none where the entry is missing or empty.

    Files from before torch 1.6 cannot be mapped and are read whole. DamagedError when the file is missing, damaged, or
    holds anything but named tensors with data: nothing in it is ever run (`weights_only`).
    """

    def __init__(self, path: Path, *, entry: str | None = None) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.mapped = file.read(4) == b"PK\x03\x04"
            dropped = torch.serialization.get_unsafe_globals_in_checkpoint(path) if entry and self.mapped else []
            with torch.serialization.safe_globals([(_Dropped, name) for name in dropped]):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
            if entry and isinstance(loaded, dict):
                loaded = loaded.get(entry) or {}
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        except pickle.UnpicklingError as error:
            raise DamagedError(
                f"{path} holds more than tensors, and nothing else in it is loaded; look for a safetensors version"
            ) from error
        except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise DamagedError(f"{path} is not a whole file of torch.save; fetch or copy it again") from error
        if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
            raise DamagedError(f"{path} holds something else than tensors by name; expected a model's state dict")
        if empty := [name for name, tensor in loaded.items() if tensor.is_meta]:
            raise DamagedError(
                f"{path} holds the shape but not the data of {empty[0]}, a known fault of offloaded conversions; "
                "prepare the model again"
            )
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in loaded.items()}
        self.specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in loaded.items()}

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces of at most CHUNK; each piece is valid until the next is asked for."""
        tensor = self._tensors[name]
        flat = tensor.reshape(-1)
        step = CHUNK // tensor.element_size()
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            yield tensor_bytes(piece)
            if self.mapped and tensor.is_contiguous():
                _forget(piece)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors on the CPU whose memory is the file's, copied page by page only where they are written to."""
        return {name: self._tensors[name] for name in names}


def _forget(mapped: Tensor) -> None:
    """Drop the pages of a file's mapping from this process's memory; they are read again when they are touched."""
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.numel() * mapped.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(begin, end - begin, mmap.MADV_DONTNEED)
