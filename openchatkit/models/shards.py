"""Names of shards, the unit in which weights are stored, loaded and spread over stages: `embed`, layers, `head`."""

import re

EMBED = "embed"
HEAD = "head"
_LAYER = re.compile(r"layer_(\d{5})")


def layer_name(number: int) -> str:
    """Return the shard of the layer with this global number, counted from 0."""
    return f"layer_{number:05d}"


def layer_number(shard: str) -> int | None:
    """Invert `layer_name`; None for `embed` and `head`."""
    match = _LAYER.fullmatch(shard)
    return int(match[1]) if match else None


def shard_names(num_layers: int) -> list[str]:
    """Return all shards of a model in the order in which data flows through them."""
    return [EMBED, *map(layer_name, range(num_layers)), HEAD]
