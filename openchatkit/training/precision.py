"""The dtype that layers compute in, and the loss scale that keeps float16 gradients from vanishing.

Parameters, gradients and optimizer state are float32 throughout; autocast casts what enters a matrix product.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from loguru import logger

from openchatkit.distributed.layout import Layout
from openchatkit.loading import hardware


def compute_dtype(precision: str, layout: Layout) -> torch.dtype:
    """Return the dtype of matrix products and of the hidden states between layers; all ranks take the same.

    "auto" is bfloat16 where the hardware of every rank computes in it, else float32. Rank 0 logs the choice, and its
    cost where some rank emulates it. UserError where a rank cannot compute in it at all.
    """
    own = hardware.choose_dtype(precision, layout.device, purpose="training")
    note = None if precision == "auto" else hardware.emulation_note(layout.device, own)
    found = layout.gather((own, note))
    dtype = own if all(other == own for other, _ in found) else torch.float32
    if layout.rank == 0:
        why = " (auto)" if precision == "auto" else ""
        logger.info("computing in {}{}", str(dtype).removeprefix("torch."), why)
        for text in sorted({text for _, text in found if text is not None}):
            logger.warning(text)
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Return autocast for a whole step, so that a weight is cast once and not once a micro-batch; none for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@dataclass
class LossScaler:
    """A loss scale, fixed or dynamic as in Megatron-LM and DeepSpeed: it doubles after `window` good steps in a row.

    The first `hysteresis` - 1 steps that overflow leave it as it is; from then on each of them halves it, until it has
    doubled again. With `consecutive` they count in a row: a good step starts the count again.
    """

    scale: float
    dynamic: bool
    minimum: float = 1.0
    window: int = 1000
    hysteresis: int = 2
    good_steps: int = 0
    overflows_left: int = 2
    consecutive: bool = False

    @classmethod
    def create(
        cls,
        *,
        fp16: bool,
        fixed: float,
        initial: float,
        minimum: float,
        window: int,
        hysteresis: int,
        consecutive: bool = False,
    ) -> "LossScaler":
        """Return the scaler of the flags: 1 without float16, `fixed` if it is not 0, else dynamic from `initial`."""
        if not fp16:
            return cls(1.0, dynamic=False)
        dynamic = fixed == 0
        return cls(initial if dynamic else fixed, dynamic, minimum, window, hysteresis, 0, hysteresis, consecutive)

    @property
    def can_fall(self) -> bool:
        """Whether further overflows lead to a lower scale."""
        return self.dynamic and self.scale > self.minimum

    @property
    def is_exhausted(self) -> bool:
        """Whether the next overflow would halve a scale that is the least already."""
        return self.dynamic and self.scale <= self.minimum and self.overflows_left <= 1

    def update(self, *, overflow: bool) -> None:
        """Count one step. Every rank calls this with the same `overflow`, so all scales stay equal."""
        if not self.dynamic:
            return
        if overflow:
            self.good_steps = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.good_steps += 1
        if self.consecutive:
            self.overflows_left = self.hysteresis
        if self.good_steps % self.window == 0:
            self.scale *= 2
            self.overflows_left = self.hysteresis

    def state_dict(self) -> dict[str, float | int | bool]:
        """Return the state for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint's state; a scale that is now fixed, or not needed, stays as the flags say."""
        if self.dynamic and state["dynamic"]:
            self.scale = state["scale"]
            self.good_steps, self.overflows_left = state["good_steps"], state["overflows_left"]
