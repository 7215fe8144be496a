"""A micro-batch's tokens as each layer of a model with options is given them: what they see, and what is dropped.

Positions and kinds of attention that weigh or confine what a token sees become masks, which are added to the scores of
attention; documents that share a row are in them. Layers of one kind have one mask.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.libraries import pytorch
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part
from openchatkit.models.documents import Borders, Seen, find_borders
from openchatkit.models.dropout import mix
from openchatkit.models.positions import alibi_bias, alibi_slopes, list_buckets, measure_distances
from openchatkit.models.shards import layer_number
from openchatkit.models.sparse_attention import block_mask, make_layout
from openchatkit.models.sparsity import read_sparsity


class BlocksSeen(NamedTuple):
    """The pairs of tokens that see each other, as `pytorch.attend_to_blocks` takes them."""

    mask: Any


class LayerView(NamedTuple):
    """Of one layer: what tokens see, the buckets of relative biases, and the layer's keys of dropout.

    `buckets` (see `positions.list_buckets`) are there where the model has such biases, `keys`, int64 [batch], where
    something is dropped. `seen` is a mask with biases, and where attention's weights are dropped.
    """

    seen: Seen | BlocksSeen | None = None
    buckets: Tensor | None = None
    keys: Tensor | None = None


class EmbeddingView(NamedTuple):
    """Of the embedding: tokens' positions in their documents, and keys of dropout.

    `positions` are int64 [batch, length] or [length], and below `reach`.
    """

    positions: Tensor
    reach: int
    keys: Tensor | None


def needs_masks(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention of some layers needs a mask, since borders of documents do not say all that it depends on."""
    options = config.options
    is_sparse = any(kind != "global" for kind in options.attention_config)
    return (
        options.pos_emb in ("rpe", "alibi")
        or options.attention_dropout > 0
        or (is_sparse and not pytorch.attends_to_blocks(device, dtype, config.head_dim))
    )


class Layouts:
    """The layouts of a model's sparse layers, of the heads of a part; each is made once, on the device that asks."""

    def __init__(self, config: ModelConfig, part: Part) -> None:
        self._config, self._part = config, part
        self.sparsity = read_sparsity(dict(config.options.sparsity_config))
        self._made: dict[tuple[str, int], Tensor] = {}

    def get(self, kind: str, layer: int, *, reach: int, device: torch.device) -> Tensor:
        """Return a layer's layout, bool [heads or 1, blocks, blocks], for rows of at least `reach` tokens."""
        key = (kind, layer if self.sparsity.count_random_blocks(kind) else 0)
        layout = self._made.get(key)
        if layout is None or layout.shape[-1] * self.sparsity.block < reach or layout.device != device:
            config = self._config
            blocks = -(-max(config.max_position_embeddings, reach) // self.sparsity.block)
            layout = make_layout(kind, self.sparsity, blocks=blocks, heads=config.num_heads, layer=layer)
            if len(layout) > 1:
                layout = layout.narrow(0, self._part.first(len(layout)), self._part.share(len(layout)))
            layout = self._made[key] = layout.to(device)
        return layout


class Views:
    """Of `rows` rows of tokens at `positions`, which follow `before` others.

    `seen` is what they see of their documents, None where each row is one; `dtype` is that of masks. `keys` are the
    rows' keys of dropout (see `dropout`), on any device; without them nothing is dropped. UserError for tokens beyond
    the end of a table of positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        part: Part,
        *,
        rows: int,
        positions: Tensor,
        before: int,
        seen: Seen | None,
        dtype: torch.dtype,
        keys: Tensor | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        self._layouts = Layouts(config, part) if layouts is None else layouts
        self._config, self._part, self._rows, self._dtype = config, part, rows, dtype
        self._positions, self._before, self._given = positions, before, seen
        self._length, self._device = positions.shape[-1], positions.device
        options, reach = config.options, before + self._length
        if options.pos_emb == "learned" and positions.dim() == 1 and reach > config.max_position_embeddings:
            raise UserError(
                f"{reach} tokens a row: the model has learned {config.max_position_embeddings} positions; make rows "
                "shorter"
            )
        self._keys = None if keys is None else pytorch.send(keys, self._device)
        self._buckets: Tensor | None = None
        if options.pos_emb == "rpe":
            self._buckets = list_buckets(
                self._length,
                reach,
                buckets=options.rpe_num_buckets,
                max_distance=options.rpe_max_distance,
                device=self._device,
            )
        self._plain: Tensor | None = None  # the mask of documents alone
        self._seen: dict[tuple[str, int | None], Seen | BlocksSeen | None] = {}

    def of_embedding(self) -> EmbeddingView:
        """Return what the embedding is given."""
        keys = None if self._keys is None else mix(self._keys, 0)
        return EmbeddingView(self._positions, self._before + self._length, keys)

    def of_layer(self, shard: str) -> LayerView:
        """Return what a layer is given."""
        number, options = layer_number(shard), self._config.options
        assert number is not None, shard
        kind = options.attention_config[number] if options.attention_config else "global"
        # Layers of one kind differ by their random blocks alone.
        key = (kind, number if self._layouts.sparsity.count_random_blocks(kind) else None)
        if key not in self._seen:
            self._seen[key] = self._see(kind, number)
        keys = None if self._keys is None else mix(self._keys, 1 + number)
        return LayerView(self._seen[key], self._buckets, keys)

    def _see(self, kind: str, layer: int) -> Seen | BlocksSeen | None:
        """Return what tokens see in a layer."""
        options = self._config.options
        if not needs_masks(self._config, self._device, self._dtype):
            if kind != "global" and not self._before and not isinstance(self._given, Tensor):
                return self._find_blocks(kind, layer)
            window = options.sliding_window_width
            if kind == "global" and window is None:
                return self._given
            if kind == "global" and window is not None and (borders := self._find_borders()) is not None:
                return borders._replace(before=window)
        mask = self._mask_documents()
        if (confined := self._confine(kind, layer)) is not None:
            mask = mask.masked_fill(~confined, -torch.inf)
        if options.pos_emb == "alibi":
            slopes, heads = alibi_slopes(self._config.num_heads), self._part.share(self._config.num_heads)
            own = slopes.narrow(0, self._part.first(len(slopes)), heads)
            mask = mask + alibi_bias(own, self._measure_distances()).to(self._dtype)
        return mask

    def _confine(self, kind: str, layer: int) -> Tensor | None:
        """Return what tokens may see by a layer's kind, bool [heads or 1, length, all]; None for all."""
        if kind == "global":
            window = self._config.options.sliding_window_width
            return None if window is None else (self._measure_distances() <= window).unsqueeze(0)
        layout = self._layouts.get(kind, layer, reach=self._before + self._length, device=self._device)
        block = self._layouts.sparsity.block
        return block_mask(layout, block, self._length, before=self._before, device=self._device)

    def _find_blocks(self, kind: str, layer: int) -> BlocksSeen:
        """Return what tokens see in a sparse layer, for the kernel that computes no blocks which are hidden."""
        layout = self._layouts.get(kind, layer, reach=self._length, device=self._device)
        block, starts = self._layouts.sparsity.block, None
        if self._positions.dim() > 1:
            starts = torch.arange(self._length, device=self._device) - self._positions

        def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            of_head = layout[head if len(layout) > 1 else 0]
            seen = of_head[query // block, key // block] & (key <= query)
            return seen if starts is None else seen & (key >= starts[row, query])

        return BlocksSeen(
            pytorch.make_block_mask(
                is_seen,
                rows=None if starts is None else len(starts),
                heads=len(layout) if len(layout) > 1 else None,
                length=self._length,
                reach=self._length,
                device=self._device,
            )
        )

    def _measure_distances(self) -> Tensor:
        return measure_distances(self._length, before=self._before, device=self._device)

    def _find_borders(self) -> Borders | None:
        """Return the borders of the documents, or of rows that are one each, where a kernel reads them."""
        if self._given is not None or self._before:
            return self._given if isinstance(self._given, Borders) else None
        if not pytorch.attends_documents(self._device, self._dtype, self._config.head_dim):
            return None
        borders = find_borders(torch.zeros(self._rows, self._length, dtype=torch.int64, device="cpu"))
        return borders._replace(at=pytorch.send(borders.at, self._device))

    def _mask_documents(self) -> Tensor:
        """Return what tokens see of their documents as a mask to be added, [batch or 1, 1, length, all]."""
        if self._plain is None:
            given = self._given
            assert not isinstance(given, Borders), "a mask is needed: see `needs_masks`"
            if given is None:
                place = torch.arange(self._before + self._length, device=self._device)
                given = (place <= place[self._before :].unsqueeze(-1)).view(1, 1, self._length, -1)
            if given.dtype == torch.bool:
                given = torch.zeros(given.shape, dtype=self._dtype, device=self._device).masked_fill(~given, -torch.inf)
            self._plain = given
        return self._plain
