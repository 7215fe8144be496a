"""Tensors and runs of a rank in buckets: as much at once as one message between replicas takes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

BUCKET = 1 << 25  # elements that one collective takes


def gather_buckets(items: Iterable[T], size: Callable[[T], int], limit: int = BUCKET) -> Iterator[list[T]]:
    """Yield items in order, as many at once as have `limit` elements together; a larger one by itself."""
    bucket: list[T] = []
    elements = 0
    for item in items:
        if bucket and elements + size(item) > limit:
            yield bucket
            bucket, elements = [], 0
        bucket.append(item)
        elements += size(item)
    if bucket:
        yield bucket


class Flat:
    """A bucket of tensors as one, in a context after which they have what has become of it."""

    def __init__(self, bucket: Sequence[Tensor], *, on_cpu: bool = False) -> None:
        self.bucket, self.on_cpu = bucket, on_cpu

    def __enter__(self) -> Tensor:
        alone = len(self.bucket) == 1 and self.bucket[0].is_contiguous()
        flat = self.bucket[0].view(-1) if alone else torch.cat([tensor.reshape(-1) for tensor in self.bucket])
        self._flat = flat.cpu() if self.on_cpu else flat
        return self._flat

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and self._flat.data_ptr() != self.bucket[0].data_ptr():
            sizes = [tensor.numel() for tensor in self.bucket]
            for tensor, part in zip(self.bucket, torch.split(self._flat, sizes), strict=True):
                tensor.copy_(part.view_as(tensor))
