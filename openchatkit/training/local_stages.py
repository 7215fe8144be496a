"""The stages of one rank, as one set of shards: data passes them at different times, all else treats them alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from openchatkit.distributed.layout import Layout
from openchatkit.distributed.seams import Enter, Gather, Leave, Scatter
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.stage import Stage


class LocalStages:
    """Stages by their number in the pipeline, in the order of the data's flow; at least one.

    Once a shard is filled, `on_filled` is given its name and module, before the next one takes memory.
    """

    def __init__(
        self, stages: Mapping[int, Stage], *, on_filled: Callable[[str, nn.Module], None] | None = None
    ) -> None:
        self._on_filled = on_filled
        self.by_number = dict(sorted(stages.items()))
        self.config = next(iter(self.by_number.values())).config
        self.part = next(iter(self.by_number.values())).part
        self.hidden_parts = next(iter(self.by_number.values())).hidden_parts
        self._owners = {shard: stage for stage in self.by_number.values() for shard in stage.shards}

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.by_number.values())

    @property
    def shards(self) -> Sequence[str]:
        """Names of the shards of all stages, in the order of the data's flow."""
        return list(self._owners)

    @property
    def has_embed(self) -> bool:
        """Whether one of the stages takes token ids."""
        return EMBED in self._owners

    @property
    def has_head(self) -> bool:
        """Whether one of the stages ends in the projection to the vocabulary."""
        return HEAD in self._owners

    @property
    def is_compiled(self) -> bool:
        """Whether layers are programs of torch.compile."""
        return any(stage.is_compiled for stage in self)

    @property
    def projection(self) -> nn.Linear:
        """The map from normed hidden states to the vocabulary, where `has_head`."""
        return self._owners[HEAD].projection

    def named_shards(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield all shards in the order of the data's flow."""
        for stage in self:
            yield from stage.named_shards()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all stages."""
        for stage in self:
            yield from stage.parameters()

    def load(self, shard: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a shard's stored tensors as its parameters; see `Stage.load`."""
        self._owners[shard].load(shard, tensors)
        self._note_filled(shard)

    def init_weights(self, seed: int, device: torch.device) -> None:
        """Fill new models on a device; see `Stage.init_weights`."""
        for shard, stage in self._owners.items():
            stage.shards[shard].to_empty(device=device)
            stage.init_shard(shard, seed)
            self._note_filled(shard)

    def _note_filled(self, shard: str) -> None:
        if self._on_filled is not None:
            self._on_filled(shard, self._owners[shard].shards[shard])


def join_parts(stage: Stage, layout: Layout, *, splits_tokens: bool) -> None:
    """Put the seams to the other parts of a tensor group into a stage, if there is one."""
    if layout.tensor is None:
        return
    if splits_tokens:
        stage.connect_parts(Gather(layout.tensor), Scatter(layout.tensor), splits_tokens=True)
    else:
        stage.connect_parts(Enter(layout.tensor), Leave(layout.tensor))
