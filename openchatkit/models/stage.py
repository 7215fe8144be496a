"""A run of consecutive layers, with or without the embedding before and the head behind: a whole model or a part."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openchatkit.models.config import ModelConfig
from openchatkit.models.layers import RotaryTable
from openchatkit.models.names import EMBED, HEAD, layer_name, shard_names
from openchatkit.models.registry import family


class Stage(nn.Module):
    """Layers `first` to `last` (exclusive) of a model.

    forward takes token ids [batch, length] where the stage has the embedding, else hidden states
    [batch, length, hidden_size], and returns hidden states, normed where it has the head; `logits` projects those.
    With tied embeddings the head's projection is a parameter of its own that starts equal to the embedding: who trains
    the model adds the two gradients and applies the sum to both.
    """

    def __init__(
        self,
        config: ModelConfig,
        first: int = 0,
        last: int | None = None,
        *,
        embed: bool = True,
        head: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        last = config.num_layers if last is None else last
        names = [EMBED] * embed + [layer_name(i) for i in range(first, last)] + [HEAD] * head
        self.shards = nn.ModuleDict({name: family(config).module(config, name) for name in names})
        self.rotary = RotaryTable(config.rotary_dim, config.rotary_base)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.rotary(x.shape[1], x.device)
        for name, module in self.shards.items():
            if name == EMBED:
                x = module(x)
                # Hidden states travel in the dtype that the layers compute in, within a stage and between stages.
                if torch.is_autocast_enabled(x.device.type):
                    x = x.to(torch.get_autocast_dtype(x.device.type))
            elif name == HEAD:
                x = module(x)
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(module, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = module(x, cos, sin)
        return x

    @property
    def projection(self) -> nn.Linear:
        """The map from normed hidden states to the vocabulary, of a stage that has the head."""
        return getattr(self.shards[HEAD], family(self.config).projection)

    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden_size] as `forward` of a stage with the head returns it -> [batch, length, vocab]."""
        return self.projection(hidden)

    def named_shards(self) -> Iterator[tuple[str, nn.Module]]:
        """The stage's shards in the order of the data's flow."""
        yield from self.shards.items()

    def load(self, shard: str, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
        """Take a shard's stored tensors as its parameters; they become the parameters themselves, uncopied.

        `tensors` must hold exactly the shard's parameters, the tied projection included.
        """
        module = self.shards[shard]
        module.load_state_dict({k: v.to(dtype) if dtype else v for k, v in tensors.items()}, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill a new model: weights normal(0, init_std), biases 0, norms 1, as transformers does.

        A shard's values depend on `seed` and the shard alone, so however stages are cut, the model is the same.
        """
        order = shard_names(self.config.num_layers)
        for shard, part in self.named_shards():
            generator = torch.Generator().manual_seed(seed * len(order) + order.index(shard))
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    values = torch.empty(module.weight.shape)
                    module.weight.copy_(values.normal_(0.0, self.config.init_std, generator=generator))
                elif isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
