"""The optimizer, its learning rate as a pure function of the step, and the one gradient norm of the whole model."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, shard_names
from openchatkit.training.local_stages import LocalStages


def build_optimizer(
    name: str, stages: LocalStages, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return Adam (weight decay in the gradient), AdamW (decoupled) or AdamW with 8-bit state; only matrices decay."""
    parameters = list(stages.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": lr, "betas": betas, "eps": eps}
    if name == "8bit-adam":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("--optimizer 8bit-adam needs bitsandbytes: pip install 'openchatkit[gpu]'") from error
        make: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit  # type: ignore[attr-defined]
        return make(groups, **options)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[name](groups, fused=True, **options)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the rate of step `step`, counted from 0: a linear rise up to `peak`, then a linear fall to nearly 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)


def own_parameters(stages: LocalStages) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield shard, name and parameter of all that this rank stores; with tied embeddings, not the projection."""
    for shard, module in stages.named_shards():
        for name, parameter in module.named_parameters():
            if not _is_tied_copy(stages, shard, name):
                yield shard, name, parameter


def squared_norms(stages: LocalStages) -> Tensor:
    """Return the squared gradient norm of each shard in float64 [num_layers + 2], 0 for those of other ranks.

    Adding the entries in order gives the same bits however the shards are spread over stages.
    """
    order = {name: i for i, name in enumerate(shard_names(stages.config.num_layers))}
    device = next(stages.parameters()).device
    norms = torch.zeros(len(order), dtype=torch.float64, device=device)
    for shard, _, parameter in own_parameters(stages):
        norms[order[shard]] += torch.linalg.vector_norm(gradient_of(parameter)).double().square()
    return norms


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert parameter.grad is not None, tuple(parameter.shape)
    return parameter.grad


def add_tied_gradients(stages: LocalStages, layout: Layout) -> None:
    """With tied embeddings, give the embedding and the head's projection the sum of their gradients."""
    if not stages.config.tie_embeddings:
        return
    ends = [_tied_end(stages, shard) for shard in (EMBED, HEAD) if shard in stages.shards]
    if len(ends) == 2:
        total = gradient_of(ends[0]) + gradient_of(ends[1])
        for parameter in ends:
            gradient_of(parameter).copy_(total)
    elif ends:
        layout.sum_over_ends(gradient_of(ends[0]))


def sum_gradients_over_replicas(parameters: Iterable[nn.Parameter], layout: Layout, *, through_cpu: bool) -> None:
    """Add every gradient over the replicas, in buckets that one all-reduce takes; `through_cpu` reduces by gloo."""
    if layout.data is None:
        return
    for bucket in _buckets([gradient_of(p) for p in parameters], limit=1 << 25):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        reduced = flat.cpu() if through_cpu else flat
        layout.sum_over_replicas(reduced)
        for gradient, part in zip(
            bucket, torch.split(reduced.to(flat.device), [g.numel() for g in bucket]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor], *, limit: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > limit:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _is_tied_copy(stages: LocalStages, shard: str, name: str) -> bool:
    return stages.config.tie_embeddings and shard == HEAD and name == family(stages.config).tied_weight


def _tied_end(stages: LocalStages, shard: str) -> Tensor:
    return stages.projection.weight if shard == HEAD else next(stages.module(EMBED).parameters())
