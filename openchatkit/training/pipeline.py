"""Micro-batches through this rank's stage and its neighbours: the one file that touches torch's pipelining.

torch 2.13 traps that are handled here: stage inputs and outputs are declared, else the first step runs one micro-batch
more to learn them; the shapes then stay fixed; gradients must not be scaled by the schedule, since the loss is already
divided by the tokens of the whole step; merged outputs would keep every micro-batch's hidden states.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from openchatkit.distributed.layout import Layout
from openchatkit.models.stage import Stage

_SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}

Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """Forward and backward of a batch that is cut into micro-batches of a fixed shape.

    `loss(hidden, target)` runs on the last stage, once a micro-batch, and returns a scalar to backpropagate as it is;
    the target is one tensor with a row for each row of tokens, on whatever device `loss` wants it. `document_starts`
    (see `Stage`) do not travel: each rank gives them to its own stage. A single stage runs a plain loop over the
    micro-batches, with the same bits.
    """

    def __init__(
        self,
        stage: Stage,
        layout: Layout,
        *,
        schedule: str,
        micro_batches: int,
        micro_batch_size: int,
        seq_length: int,
        dtype: torch.dtype,
        loss: Loss,
    ) -> None:
        self.stage, self.layout, self.loss = stage, layout, loss
        self.micro_batches = micro_batches
        self._schedule: PipelineScheduleSingle | None = None
        if layout.stages > 1:
            tokens = torch.empty(micro_batch_size, seq_length, dtype=torch.int64, device="meta")
            shape = (micro_batch_size, seq_length, stage.config.hidden_size)
            hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            runner = PipelineStage(
                stage,
                layout.stage,
                layout.stages,
                layout.device,
                input_args=tokens if layout.stage == 0 else hidden,
                output_args=hidden,
                group=layout.pipeline,
            )
            self._schedule = _SCHEDULES[schedule](runner, micro_batches, loss_fn=loss, scale_grads=False)

    def forward_backward(self, tokens: Tensor, target: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Add the gradients of a batch, int64 [micro_batches * micro_batch_size, seq_length], to the parameters'.

        Returns the sum of the micro-batches' losses on the last stage, 0 on the others.
        """
        losses: list[Tensor] = []
        if self._schedule is None:
            for x, y, starts in self._cut(tokens, target, document_starts):
                losses.append(self.loss(self.stage(x, starts), y))
                losses[-1].backward()  # type: ignore[no-untyped-call]
        else:
            inputs, options = self._arguments(tokens, target, document_starts, losses)
            self._schedule.step(*inputs, **options)
        return self._total(losses)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, target: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Return the micro-batches' summed loss on the last stage, 0 on the others; gradients stay as they are."""
        losses: list[Tensor] = []
        if self._schedule is None:
            cut = self._cut(tokens, target, document_starts)
            losses = [self.loss(self.stage(x, starts), y) for x, y, starts in cut]
        else:
            inputs, options = self._arguments(tokens, target, document_starts, losses)
            self._schedule.eval(*inputs, **options)
        return self._total(losses)

    def _arguments(
        self, tokens: Tensor, target: Tensor, document_starts: Tensor | None, losses: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the arguments that torch's schedule takes on this stage; it appends to `losses` on the last one."""
        inputs = (tokens,) if self.layout.stage == 0 else ()
        options: dict[str, Any] = {"return_outputs": False}
        if self.layout.is_last_stage:
            options |= {"target": target, "losses": losses}
        if document_starts is not None:
            options["document_starts"] = document_starts
        return inputs, options

    def _cut(
        self, tokens: Tensor, target: Tensor, document_starts: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Return the micro-batches of all three."""
        number = self.micro_batches
        starts = [None] * number if document_starts is None else document_starts.chunk(number)
        return zip(tokens.chunk(number), target.chunk(number), starts, strict=True)

    def _total(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.layout.device)
        for loss in losses:
            total += loss.detach()
        return total
