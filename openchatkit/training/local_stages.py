"""The stages of one rank, as one set of shards: data passes them at different times, all else treats them alike."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.stage import Stage


class LocalStages:
    """Stages by their number in the pipeline, in the order of the data's flow; at least one."""

    def __init__(self, stages: Mapping[int, Stage]) -> None:
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
