"""The forward pass of one of the kit's own networks over new tokens of one text; see `runner`."""

from collections.abc import Sequence
from typing import Any

import torch

from openchatkit.models.cache import KVCache
from openchatkit.models.stage import Stage


class StageRunner:
    """Runs a network of the kit's own, with room for `limit` tokens in each cache."""

    draft_length: int | None = None
    recurrent, croppable = False, True

    def __init__(self, stage: Stage, *, device: torch.device, limit: int) -> None:
        self._stage, self._device, self._limit = stage, device, limit

    def new_cache(self) -> list[KVCache]:
        return self._stage.new_cache(1, self._limit)

    def truncate(self, cache: Any, length: int) -> None:
        for layer in cache:
            layer.length = length

    @torch.inference_mode()
    def forward(self, cache: Any, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        return self._logits(tokens, keep, cache)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], keep: int) -> torch.Tensor:
        """As `ModelRunner.read`."""
        return self._logits(tokens, keep)

    def _logits(self, tokens: Sequence[int], keep: int, cache: list[KVCache] | None = None) -> torch.Tensor:
        hidden = self._stage(torch.tensor([tokens], device=self._device), cache=cache)  # [1, new, width]
        return self._stage.logits(hidden[:, -keep:])[0].float()
