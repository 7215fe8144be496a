"""The keys and values that attention has computed, kept so that tokens already read are not read again."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one layer, for up to `capacity` tokens a row; the first `length` of them are filled.

    `content` is [2, batch, heads, capacity, head_dim]: rotated keys, then values. For inference alone: tokens are
    written in place, which autograd does not follow.
    """

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.content = torch.empty(2, batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self.capacity, self.length = capacity, 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the next tokens, [batch, heads, new, head_dim]; returns those of all so far."""
        end = self.length + key.shape[2]
        self.content[0, :, :, self.length : end] = key
        self.content[1, :, :, self.length : end] = value
        self.length = end
        return self.content[0, :, :, :end], self.content[1, :, :, :end]
