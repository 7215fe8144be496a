"""Streams of a tensor's bytes from one file to another: cast, checked, counted, several files at a time."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from openchatkit.errors import UserError
from openchatkit.formats.tensor_file import cast, tensor_bytes

_Item = TypeVar("_Item")
_counting = threading.Lock()


def stream(
    chunks: Iterable[memoryview],
    source: torch.dtype,
    target: torch.dtype,
    *,
    what: str,
    progress: tqdm,
    finite: bool = True,
) -> Iterator[memoryview]:
    """Yield the bytes of one tensor in the dtype `target`.

    UserError names the tensor (`what`) whose numbers would become infinite or, with `finite`, already are not finite.
    """
    for chunk in _convert(chunks, source, target, what=what, finite=finite):
        yield chunk
        with _counting:
            progress.update(len(chunk))


def convert_shard(
    tensors: Mapping[str, Tensor], target: torch.dtype | None, shard: str, *, finite: bool = True
) -> dict[str, Tensor]:
    """Return a shard's tensors on the CPU in the dtype `target`, by default as they are; errors as `stream`."""
    return {
        name: _convert_tensor(tensor, target or tensor.dtype, what=f"{name} of {shard}", finite=finite)
        for name, tensor in tensors.items()
    }


def _convert_tensor(tensor: Tensor, target: torch.dtype, *, what: str, finite: bool) -> Tensor:
    pieces = list(_convert([tensor_bytes(tensor)], tensor.dtype, target, what=what, finite=finite))
    if tensor.dtype == target:
        return tensor
    return torch.frombuffer(pieces[0], dtype=target).reshape(tensor.shape)


def _convert(
    chunks: Iterable[memoryview], source: torch.dtype, target: torch.dtype, *, what: str, finite: bool
) -> Iterator[memoryview]:
    chunks = _check_finite(chunks, source, what) if finite else chunks
    try:
        yield from chunks if source == target else cast(chunks, source, target)
    except OverflowError as error:
        name = str(target).removeprefix("torch.")
        raise UserError(f"{what} holds {error}, more than {name} can; convert to bfloat16 or keep the dtype") from error


def _check_finite(chunks: Iterable[memoryview], dtype: torch.dtype, what: str) -> Iterator[memoryview]:
    for chunk in chunks:
        if not torch.stack(torch.frombuffer(chunk, dtype=dtype).aminmax()).isfinite().all():
            raise UserError(
                f"{what} holds NaN or infinite numbers: such a model answers nothing; fetch it again, go back to an "
                "earlier checkpoint, or pass --allow-non-finite to convert it as it is"
            )
        yield chunk


def digest(chunks: Iterable[memoryview]) -> bytes:
    """Return the SHA-256 of a tensor's bytes."""
    made = hashlib.sha256()
    for chunk in chunks:
        made.update(chunk)
    return made.digest()


def run_parallel(function: Callable[[_Item], object], items: Iterable[_Item], *, workers: int | None = None) -> None:
    """Call `function` on every item, several at a time: hashing and disks then overlap. The first error ends it."""
    pool = ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1))
    try:
        for _ in pool.map(function, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
