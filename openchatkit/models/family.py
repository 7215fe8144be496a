"""The interface of a model family: config reader, modules, and the map between shard names and Hugging Face keys."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import WHOLE, Cut, Part
from openchatkit.models.shards import EMBED, HEAD, layer_name, layer_number


class SkipInit(TorchFunctionMode):
    """A context in which modules are built without filling their parameters.

    On the meta device, filling loads 800 modules of torch (over a second, 75 MB) to compute nothing.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Family:
    """A network's modules. `norm`, `projection` and `embedding` name the submodules of the head and of the embedding.

    `cuts` says of every parameter that a model may have, by its name within a shard, how it is spread over parts.
    `takes_views`: embedding and layers are given views of the tokens (see `views`). `of_all_layers` names matrices that
    are the same in all layers: each has its own, and the sum of all gradients. They are not used in products.
    """

    name: str
    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    embed: Callable[[ModelConfig, Part], nn.Module]
    layer: Callable[[ModelConfig, Part], nn.Module]
    head: Callable[[ModelConfig, Part], nn.Module]
    cuts: Callable[[ModelConfig], Mapping[str, Cut]]
    norm: str
    projection: str
    embedding: str
    body_prefix: str
    layers_prefix: str
    projection_aliases: tuple[str, ...]
    ignored: re.Pattern[str]
    takes_views: bool = False
    of_all_layers: tuple[str, ...] = ()

    @property
    def tied_weight(self) -> str:
        """The head's parameter that a model with tied embeddings takes from the embedding shard."""
        return f"{self.projection}.weight"

    @property
    def embedding_weight(self) -> str:
        """The embedding shard's one parameter."""
        return f"{self.embedding}.weight"

    def module(self, config: ModelConfig, shard: str, part: Part = WHOLE) -> nn.Module:
        """Build the module that a shard's parameters belong to, or a part of it."""
        return {EMBED: self.embed, HEAD: self.head}.get(shard, self.layer)(config, part)

    def parameter_shapes(self, config: ModelConfig, shard: str) -> dict[str, tuple[int, ...]]:
        """Return the parameters that a shard stores, all of them and no others, with their whole shapes."""
        with torch.device("meta"), SkipInit():
            parameters = self.module(config, shard).named_parameters()
        tied = config.tie_embeddings and shard == HEAD
        return {name: tuple(p.shape) for name, p in parameters if not (tied and name == self.tied_weight)}

    def hf_key(self, shard: str, name: str) -> str:
        """Return the Hugging Face key of a parameter: ("layer_00003", "mlp.x") -> "gpt_neox.layers.3.mlp.x"."""
        number = layer_number(shard)
        if number is not None:
            return f"{self.layers_prefix}{number}.{name}"
        return name if name.startswith(f"{self.projection}.") else f"{self.body_prefix}{name}"

    def from_hf_key(self, key: str) -> tuple[str, str] | None:
        """Invert `hf_key`; None for a buffer that holds nothing learnt. Raises KeyError for a key of another model."""
        if self.ignored.fullmatch(key):
            return None
        module, _, kind = key.rpartition(".")
        if module in (self.projection, *self.projection_aliases):
            return HEAD, f"{self.projection}.{kind}"
        if layer := re.fullmatch(re.escape(self.layers_prefix) + r"(\d+)\.(.+)", key):
            return layer_name(int(layer[1])), layer[2]
        if module == f"{self.body_prefix}{self.embedding}":
            return EMBED, f"{self.embedding}.{kind}"
        if module == f"{self.body_prefix}{self.norm}":
            return HEAD, f"{self.norm}.{kind}"
        raise KeyError(key)
