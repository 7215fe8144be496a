"""Confinement of attention to documents that share a row: by their borders where a kernel reads them, else by a mask.

Both are made once a micro-batch, for all layers. A mask has an entry for each pair of a row's tokens, and attention to
what it hides is computed all the same; borders are a few numbers, and that attention is not computed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openchatkit.libraries import pytorch


class Borders(NamedTuple):
    """Documents of a micro-batch whose rows are laid end to end: number i has the tokens `at[i]` to `at[i + 1]` - 1.

    `at` is int32 [documents + 1]; no document has more than `longest` tokens. A token sees itself and at most `before`
    tokens before it, -1 for all.
    """

    at: Tensor
    longest: int
    before: int = -1


# What a token sees. A mask is added to scores, or is bool; either can be broadcast to [batch, heads, length, all].
Seen = Tensor | Borders


@dataclass(frozen=True)
class Documents:
    """A micro-batch's documents, on the device that attends: each token's position in its own, and what it sees.

    `positions` is int64 [batch, length].
    """

    positions: Tensor
    seen: Seen


def confine(
    document_starts: Tensor,
    *,
    before: int = 0,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    by_mask: bool = False,
) -> Documents:
    """Return what lets token t see the tokens from document_starts[t] to t, for attention on `device` in `dtype`.

    `document_starts` is int64 [batch, length], of tokens that follow `before` others in their row. Borders need it on
    the CPU: how many documents there are decides shapes, and reading it from a GPU would wait for all its work.
    `by_mask`: borders would not do.
    """
    place = torch.arange(before, before + document_starts.shape[1], device=document_starts.device)
    positions = pytorch.send(place - document_starts, device)
    on_cpu = document_starts.device.type == "cpu"
    if not before and not by_mask and on_cpu and pytorch.attends_documents(device, dtype, head_dim):
        borders = find_borders(document_starts)
        return Documents(positions, borders._replace(at=pytorch.send(borders.at, device)))
    return Documents(positions, document_mask(pytorch.send(document_starts, device), dtype, before=before))


def document_mask(document_starts: Tensor, dtype: torch.dtype, *, before: int = 0) -> Tensor:
    """Return the block-diagonal mask with which token t sees the tokens from document_starts[t] to t and no others.

    document_starts is int64 [batch, length], of tokens that follow `before` others in their row. The mask, zeros and
    minus infinities [batch, 1, length, before + length], is added to the attention's scores. Every layer's attention
    would make such a mask of a boolean one, and keep it for backward.
    """
    place = torch.arange(before + document_starts.shape[1], device=document_starts.device)
    seen = (place >= document_starts.unsqueeze(-1)) & (place <= place[before:].unsqueeze(-1))
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf).unsqueeze(1)


def find_borders(document_starts: Tensor) -> Borders:
    """Return the borders of the documents of int64 [batch, length], of whole rows, on the CPU."""
    place = torch.arange(document_starts.shape[1])
    begins = document_starts == place
    assert torch.equal(torch.where(begins, place, 0).cummax(1).values, document_starts), (
        "these are no documents' starts"
    )
    at = torch.cat([begins.flatten().nonzero().squeeze(-1), torch.tensor([begins.numel()])])
    return Borders(at.int(), int(at.diff().max()))


def attend_documents(query: Tensor, key: Tensor, value: Tensor, borders: Borders) -> Tensor:
    """Attend causally within documents: [batch, heads, length, head_dim] -> [batch, length, heads * head_dim]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    mixed = pytorch.attend_to_segments(*flat, borders=borders.at, longest=borders.longest, before=borders.before)
    return mixed.view(query.shape).flatten(-2)
