"""How a step was spent and how much of the hardware's rate it reached: operations against those of large products.

What layers compute again is not counted, so that the share (MFU; Chowdhery et al., arXiv 2204.02311, appendix B) rises
with the speed of training alone: 6 for each number of a matrix and token, and 6 H T for each layer of width H in rows
of T tokens, of which attention sees half.
"""

from dataclasses import replace

import torch
from loguru import logger

from openchatkit.distributed.layout import Layout
from openchatkit.loading import hardware
from openchatkit.models.config import ModelConfig
from openchatkit.training import timing
from openchatkit.training.config import Settings
from openchatkit.training.device import memory_in_use
from openchatkit.training.forecast import MEASURED_STEPS
from openchatkit.training.plan import work
from openchatkit.training.plan.planner import plan_run
from openchatkit.training.step import StepResult, Trainer

_TERA = 1e12


def count_operations(settings: Settings, config: ModelConfig) -> int:
    """Return the floating-point operations of a step on all ranks, without those that repeat others."""
    run = replace(plan_run(settings, config), recompute=False)
    of_pipeline = sum(work.rank_operations(run, rank) for rank in range(run.pipeline_size))
    return of_pipeline * run.tensor_size * run.replicas


def find_peak_rate(settings: Settings, layout: Layout, dtype: torch.dtype, *, steps: int) -> float | None:
    """Return the operations a second that all ranks could reach together, on every rank.

    It is `--peak-tflops` of each, or what large products in `dtype` reach when all ranks compute them at once, as they
    train; None for a run of few `steps`, which is over before anyone reads it.
    """
    if settings.peak_tflops is not None:
        return settings.peak_tflops * _TERA * layout.world_size
    if steps < MEASURED_STEPS:
        return None
    layout.barrier()
    rates = layout.gather(hardware.matrix_rate(layout.device, dtype))
    if layout.device.type == "cuda":
        torch.cuda.empty_cache()  # The blocks of such matrices would suit nothing else.
    if layout.rank == 0:
        name = str(dtype).removeprefix("torch.")
        logger.info("large products in {} reach {:.3g} TFLOP/s a rank", name, sum(rates) / len(rates) / _TERA)
    return float(sum(rates))


class StepMeter:
    """Measures the steps of this rank; all ranks of a run of `steps` more steps make theirs together."""

    def __init__(self, settings: Settings, trainer: Trainer, *, steps: int) -> None:
        self._layout, self._timer = trainer.layout, trainer.pipeline.timer
        self._tokens = trainer.global_batch * settings.seq_length
        self._peak_rate = find_peak_rate(settings, trainer.layout, trainer.dtype, steps=steps)
        self._operations = 0 if self._peak_rate is None else count_operations(settings, trainer.stages.config)

    def measure(self, seconds: float, result: StepResult) -> dict[str, float | None]:
        """Return the keys of metrics.jsonl that say how a step of so many seconds was spent."""
        waits = self._timer.seconds(*timing.RECEIVES) if self._layout.pipeline_size > 1 else None
        return {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_seconds": result.data_seconds,
            "receive_seconds": waits,
            "operations_per_second": self._operations / seconds / self._layout.world_size if self._operations else None,
            "hardware_share": self._operations / seconds / self._peak_rate if self._peak_rate else None,
            "memory_bytes": memory_in_use(self._layout.device),
        }
