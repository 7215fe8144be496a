"""How much a model's head costs beside a layer, measured on the device that trains: stages are balanced by it."""

import time
from collections.abc import Callable

import torch
from loguru import logger
from torch import Tensor

from openchatkit.distributed.layout import Layout, balanced_layers
from openchatkit.loading import hardware
from openchatkit.models.config import ModelConfig
from openchatkit.models.dropout import row_keys
from openchatkit.models.stage import Stage
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.precision import autocast

_REPEATS = 3  # of which the fastest counts, since whatever else happens on a machine only slows


def balance_layers(
    config: ModelConfig, layout: Layout, *, stages: int, rows: int, length: int, dtype: torch.dtype, recompute: bool
) -> list[tuple[int, int]]:
    """Return the first and the last (exclusive) layer of each stage, from costs that rank 0 measures.

    `rows` and `length` are those of a micro-batch. Ranks with other devices than rank 0's go by its measure, too.
    """

    def measure() -> float:
        if layout.rank:
            return 0.0
        return measure_head(config, layout.device, rows=rows, length=length, dtype=dtype, recompute=recompute)

    head = layout.together(measure)[0]
    layers = balanced_layers(config.num_layers, stages=stages, head=head)
    if layout.rank == 0:
        counts = ", ".join(str(last - first) for first, last in layers)
        logger.info("the head costs as much as {:.1f} layers: the stages have {} layers", head, counts)
    return layers


def measure_head(
    config: ModelConfig, device: torch.device, *, rows: int, length: int, dtype: torch.dtype, recompute: bool
) -> float:
    """Return the time of the head and its loss, forward and backward, in units of that of one layer."""
    hidden = torch.zeros(rows, length, config.hidden_size, dtype=dtype, device=device)
    labels = torch.zeros(rows, length, dtype=torch.int64)
    keys = row_keys(0, 0, rows) if config.options.drops_out else None

    def run(stage: Stage, loss: Callable[[Tensor], Tensor]) -> None:
        loss(stage(hidden.detach().requires_grad_(), dropout_keys=keys)).backward()  # type: ignore[no-untyped-call]

    with autocast(device, dtype):
        layer = _make(config, device, last=1, recompute=recompute)
        layer_seconds = time_fastest(lambda: run(layer, torch.sum), device)
        head = _make(config, device, last=0, head=True)
        vocabulary_loss = VocabularyLoss(head.projection)
        return time_fastest(lambda: run(head, lambda normed: vocabulary_loss(normed, labels)), device) / layer_seconds


def _make(
    config: ModelConfig, device: torch.device, *, last: int, head: bool = False, recompute: bool = False
) -> Stage:
    with torch.device("meta"):
        stage = Stage(config, 0, last, embed=False, head=head, recompute=recompute)
    stage.to_empty(device=device)
    stage.init_weights(0)
    return stage


def time_fastest(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of the fastest of some runs on `device`, after one that does not count."""
    seconds = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
