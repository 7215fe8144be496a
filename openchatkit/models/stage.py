"""Consecutive layers of a model, with or without the embedding before and the head after them, or a part of each."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openchatkit.models.cache import KVCache
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import WHOLE, Cut, Part, cut_tensor, whole_shape
from openchatkit.models.documents import Documents, Seen, confine
from openchatkit.models.initialisation import draw_matrix
from openchatkit.models.layers import RotaryTable
from openchatkit.models.recompute import keep_in_main_memory
from openchatkit.models.recompute import recompute as recompute_layer
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, layer_name, shard_names
from openchatkit.models.views import Layouts, Views, needs_masks


class Stage(nn.Module):
    """Layers `first` to `last` (exclusive) of a model.

    forward takes token ids [batch, length] where the stage has the embedding, else hidden states
    [batch, length, hidden_size], and returns hidden states, normed where it has the head; `logits` projects those.
    `document_starts`, int64 [batch, length], confines attention to documents that share a row: token t sees those from
    document_starts[t] to t, and its position is t - document_starts[t]; without it a row is one document. It is best on
    the CPU, whatever the device of the stage (see `documents.confine`).
    `cache` (see `new_cache`) holds the tokens of earlier calls: those given now follow them, t counts all of them, and
    `document_starts` are those of the new ones. `mask`, bool [..., length, all tokens], is true where a row's token
    sees a column's, instead of itself and all before it. `dropout_keys`, int64 [batch], are those of the rows (see
    `dropout`) of a model that drops out; without them nothing is dropped.
    With tied embeddings the head's projection is a parameter of its own that starts equal to the embedding: training
    adds the two gradients and applies the sum to both.
    `recompute`: the backward pass computes layers again, but for some results if `selective`; `offload` keeps what it
    starts from in main memory.
    A stage may be one `part` of its layers: `connect_parts` gives it what adds up the parts' results. Its hidden states
    are then whole, and its logits those of its rows of the vocabulary.
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
        selective: bool = False,
        offload: bool = False,
        part: Part = WHOLE,
    ) -> None:
        super().__init__()
        self.config, self.part = config, part
        self.recompute, self.selective, self.offload = recompute, selective, offload
        last = config.num_layers if last is None else last
        names = [EMBED] * embed + [layer_name(i) for i in range(first, last)] + [HEAD] * head
        self.shards = nn.ModuleDict({name: family(config).module(config, name, part) for name in names})
        self.rotary = RotaryTable(config.rotary_dim, config.rotary_base)
        self.layouts = Layouts(config, part)
        self.is_compiled = False
        self.hidden_parts = 1  # of which this part has one, of the tokens of hidden states

    def connect_parts(self, enter: nn.Module, leave: nn.Module, *, splits_tokens: bool = False) -> None:
        """Put the seams between this part and the others in place, each of them a module from a tensor to a tensor.

        Every part calls them in the same order. `enter` is given the same tensor on all parts and returns it; its
        backward sums the parts' gradients. `leave` returns the sum of the parts' tensors; its backward returns the
        gradient, which is the same on all parts. `splits_tokens`: between `leave` and `enter`, and between stages, a
        part has its run of the tokens alone, of which the parts' number must be a divisor.
        """
        self.hidden_parts = self.part.count if splits_tokens else 1
        for module in self.shards.values():
            for name, seam in (("enter", enter), ("leave", leave)):
                if hasattr(module, name):
                    setattr(module, name, seam)

    def compile_layers(self, backend: str | Callable[..., Any]) -> None:
        """Let `torch.compile` make one program for all layers, each of which then runs it with its own parameters."""
        self.is_compiled = True
        for name, module in self.shards.items():
            if name not in (EMBED, HEAD):
                module.compile(fullgraph=True, backend=backend)

    def forward(
        self,
        x: Tensor,
        document_starts: Tensor | Documents | None = None,
        *,
        cache: Sequence[KVCache] | None = None,
        mask: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        before = cache[0].length if cache else 0
        tokens = x.shape[1] * (1 if EMBED in self.shards else self.hidden_parts)
        length = before + tokens
        assert not cache or length <= cache[0].capacity, f"{length} tokens in a cache for {cache[0].capacity}"
        # Of a cache's whole capacity, so that one table serves all its calls.
        cos, sin = self.rotary(cache[0].capacity if cache else length, x.device)
        seen: Seen | None = mask
        if document_starts is None and mask is None and before and tokens > 1:
            document_starts = torch.zeros(1, tokens, dtype=torch.int64, device=x.device)
        positions: Tensor | None = None
        if document_starts is None:
            cos, sin = cos[before:length], sin[before:length]
        else:
            if isinstance(document_starts, Tensor):
                document_starts = self.confine(document_starts, x.device, before=before)
            seen, positions = document_starts.seen, document_starts.positions
            cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        views = None
        if family(self.config).takes_views:
            views = Views(
                self.config,
                self.part,
                rows=x.shape[0],
                positions=torch.arange(before, length, device=x.device) if positions is None else positions,
                before=before,
                seen=seen,
                dtype=self._compute_dtype(x.device),
                keys=dropout_keys,
                layouts=self.layouts,
            )
        caches = iter(cache or ())
        for name, module in self.shards.items():
            if name == EMBED:
                x = module(x) if views is None else module(x, views.of_embedding())
                # Hidden states travel in the dtype that the layers compute in, within a stage and between stages.
                x = x.to(self._compute_dtype(x.device))
            elif name == HEAD:
                x = module(x)
            else:
                around = (cos, sin, seen if views is None else views.of_layer(name))
                if cache is not None:
                    x = module(x, *around, next(caches))
                elif self.recompute and torch.is_grad_enabled():
                    with keep_in_main_memory(x) if self.offload else contextlib.nullcontext():
                        x = recompute_layer(module, x, *around, selective=self.selective)
                else:
                    x = module(x, *around)
        return x

    def confine(self, document_starts: Tensor, device: torch.device, *, before: int = 0) -> Documents:
        """Return what `forward` makes of document starts; it takes either, and a wrapper may move tensors to a GPU."""
        dtype = self._compute_dtype(device)
        return confine(
            document_starts,
            before=before,
            device=device,
            dtype=dtype,
            head_dim=self.config.head_dim,
            by_mask=needs_masks(self.config, device, dtype),
        )

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of products: autocast's where it is on, else that of the parameters."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return next(self.parameters()).dtype

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]:
        """Make an empty cache of this stage's layers for `batch` rows of up to `capacity` tokens each."""
        device = next(self.parameters()).device
        heads, width = self.part.share(self.config.num_key_heads), self.config.head_dim
        dtype = self._compute_dtype(device)
        layers = [name for name in self.shards if name not in (EMBED, HEAD)]
        return [KVCache(batch, heads, capacity, width, dtype=dtype, device=device) for _ in layers]

    @property
    def projection(self) -> nn.Linear:
        """The map from normed hidden states to the vocabulary, of a stage that has the head."""
        projection = getattr(self.shards[HEAD], family(self.config).projection)
        assert isinstance(projection, nn.Linear), projection
        return projection

    def logits(self, hidden: Tensor) -> Tensor:
        """Project what `forward` of a stage with the head returns, [batch, length, hidden_size], to [..., vocab]."""
        logits: Tensor = self.projection(hidden)
        return logits

    def named_shards(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the stage's shards in the order of the data's flow."""
        yield from self.shards.items()

    def load(self, shard: str, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
        """Take a shard's stored tensors as its parameters, without a copy.

        `tensors` must hold exactly the parameters of the shard, or of this part of it (see `cuts.cut_shard`), the tied
        projection included.
        """
        module = self.shards[shard]
        module.load_state_dict({k: v.to(dtype) if dtype else v for k, v in tensors.items()}, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(True)

    def init_weights(self, seed: int) -> None:
        """Fill a new model: matrices as the config says (see `initialisation`), biases with 0, norms with 1.

        A shard's values depend on `seed` and the shard alone, so however stages and parts are cut, the model is the
        same.
        """
        for shard in self.shards:
            self.init_shard(shard, seed)

    @torch.no_grad()
    def init_shard(self, shard: str, seed: int) -> None:
        """Fill one shard of a new model; see `init_weights`."""
        order, cuts = shard_names(self.config.num_layers), family(self.config).cuts(self.config)
        generator = torch.Generator().manual_seed(seed * len(order) + order.index(shard))
        for name, parameter in self.shards[shard].named_parameters():
            if name in family(self.config).of_all_layers:
                # GPT-NeoX's own way, whatever the others'; by a generator that no shard has.
                alike = torch.Generator().manual_seed(-1 - seed)
                shape = whole_shape(parameter.shape, cuts[name], self.part.count)
                parameter.copy_(cut_tensor(draw_matrix("xavier_normal", shape, 1.0, alike), cuts[name], self.part))
            elif parameter.dim() > 1:
                self._draw(parameter, cuts[name], generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        if shard == HEAD and self.config.tie_embeddings:
            # The embedding's own draw, which another stage may hold.
            generator.manual_seed(seed * len(order) + order.index(EMBED))
            self._draw(self.projection.weight, cuts[family(self.config).tied_weight], generator)

    def _draw(self, weight: Tensor, cut: Cut, generator: torch.Generator) -> None:
        # Parts of what matrices cut by columns compute add up in the hidden state, and no others do.
        config, writes_hidden = self.config, cut == "columns"
        method = (config.output_init_method if writes_hidden else None) or config.init_method
        spread = config.output_init_std if writes_hidden else None
        # The whole matrix, so that all parts have the same weights.
        shape = whole_shape(weight.shape, cut, self.part.count)
        whole = draw_matrix(method, shape, config.init_std if spread is None else spread, generator)
        weight.copy_(cut_tensor(whole, cut, self.part))
