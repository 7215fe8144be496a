"""A KV cache in buffers that are appended to in place.

transformers' DynamicCache concatenates, hence copies, all that it holds at every token: at 1,000 tokens that is a
large part of decoding. Here a token costs its own keys and values, and dropping tokens costs nothing.
"""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from openchatkit.libraries import hf_transformers

# The smallest buffer, in tokens; a power of two suits the allocators.
MIN_CAPACITY = 64


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, each [batch, heads, tokens, head size], in `dtype` (None: the model's).

    `limit` is the most tokens that will ever be held, or None.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, dtype: torch.dtype | None = None, limit: int | None = None) -> None:
        super().__init__()
        self._dtype = dtype
        self._limit = limit
        self._length = 0
        # Replaced in one go, so that an interrupt finds both the old or both the new.
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values; return all that are held, as views."""
        new = key_states.shape[-2]
        start, end = self._length, self._length + new
        buffers = self._buffers
        if buffers is None or end > buffers[0].shape[-2]:
            buffers = self._buffers = self._grow(end, key_states, value_states)
        keys, values = buffers
        keys.narrow(2, start, new).copy_(key_states)
        values.narrow(2, start, new).copy_(value_states)
        self._length = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def truncate(self, length: int) -> None:
        """Hold only the first `length` tokens; anything that an interrupted pass left after them goes too."""
        held = 0 if self._buffers is None else self._buffers[0].shape[-2]
        assert 0 <= length <= held, f"{length} tokens of a buffer for {held}"
        self._length = length

    def reset(self) -> None:
        """Hold nothing, and free the buffers."""
        self._length, self._buffers = 0, None

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the first update makes the buffers, since it knows how much it needs."""

    def _grow(self, needed: int, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # By half each time, so that a token costs the copying of a few, however long the text becomes.
        capacity = max(needed + needed // 2, MIN_CAPACITY)
        if self._limit is not None:
            capacity = max(min(capacity, self._limit), needed)
        grown = []
        for index, state in enumerate(states):
            shape = (*state.shape[:2], capacity, state.shape[3])
            buffer = torch.empty(shape, dtype=self._dtype or state.dtype, device=state.device)
            if self._buffers is not None:
                buffer.narrow(2, 0, self._length).copy_(self._buffers[index].narrow(2, 0, self._length))
            grown.append(buffer)
        return grown[0], grown[1]


class GrowingCache(Cache):
    """A `GrowingLayer` for each of `num_layers` layers, as transformers' models take it."""

    def __init__(self, num_layers: int, *, dtype: torch.dtype | None = None, limit: int | None = None) -> None:
        super().__init__(layers=[GrowingLayer(dtype, limit) for _ in range(num_layers)])

    def truncate(self, length: int) -> None:
        """Hold only the first `length` tokens, in every layer."""
        for layer in self.layers:
            assert isinstance(layer, GrowingLayer), layer
            layer.truncate(length)


def new_cache(config: PreTrainedConfig, *, dtype: torch.dtype | None = None, limit: int | None = None) -> Cache:
    """A `GrowingCache` where every layer of the model attends to all tokens, else transformers' own cache."""
    layers = hf_transformers.plain_cache_layers(config)
    return DynamicCache(config=config) if layers is None else GrowingCache(layers, dtype=dtype, limit=limit)
