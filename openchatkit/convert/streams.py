"""Tensors on their way from one file to another: recast, counted on the progress bar, refused where they do not fit."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from openchatkit.errors import UserError
from openchatkit.formats.tensor_file import cast


class Progress(Protocol):
    """What a progress bar offers here."""

    def update(self, n: int) -> object: ...


def stream(
    chunks: Iterable[memoryview], source: torch.dtype, target: torch.dtype, *, what: str, progress: Progress
) -> Iterator[memoryview]:
    """The bytes of one tensor in the dtype `target`; UserError names the tensor (`what`) that would become infinite."""
    try:
        for chunk in chunks if source == target else cast(chunks, source, target):
            yield chunk
            progress.update(len(chunk))
    except OverflowError as error:
        name = str(target).removeprefix("torch.")
        raise UserError(f"{what} holds {error}, more than {name} can; convert to bfloat16 or keep the dtype") from error
