"""Micro-batches through this rank's stage and its neighbours: the one file that touches torch's pipelining.

torch 2.13 traps that are handled here: stage inputs and outputs are declared, else the first step runs one micro-batch
more to learn them; the shapes then stay fixed; gradients must not be scaled by the schedule, since the loss is already
divided by the tokens of the whole step; merged outputs would keep every micro-batch's hidden states.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from openchatkit.distributed.layout import Layout
from openchatkit.models.stage import Stage

SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}

Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """Forward and backward of a batch that is cut into micro-batches of a fixed shape.

    `loss(hidden, target)` runs on the last stage, once a micro-batch, and returns a scalar to backpropagate as it is;
    the target is one tensor with a row for each row of tokens, on whatever device `loss` wants it. `starts` (see
    `Stage`), where there is one, is given to every stage by its own rank and does not travel. A single stage runs a
    plain loop over the micro-batches, with the same bits.
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
            self._schedule = SCHEDULES[schedule](runner, micro_batches, loss_fn=loss, scale_grads=False)

    def forward_backward(self, tokens: Tensor, target: Tensor, starts: Tensor | None = None) -> Tensor:
        """Add the gradients of a batch, int64 [micro_batches * micro_batch_size, seq_length], to the parameters'.

        Returns the sum of the micro-batches' losses on the last stage, 0 on the others.
        """
        if self._schedule is None:
            losses = []
            for x, y, documents in self._cut(tokens, target, starts):
                losses.append(self.loss(self.stage(x, documents), y))
                losses[-1].backward()
            return self._total(losses)
        return self._run(self._schedule.step, tokens, target, starts)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, target: Tensor, starts: Tensor | None = None) -> Tensor:
        """The sum of the micro-batches' losses on the last stage, 0 on the others; gradients stay as they are."""
        if self._schedule is None:
            cut = self._cut(tokens, target, starts)
            return self._total([self.loss(self.stage(x, documents), y) for x, y, documents in cut])
        return self._run(self._schedule.eval, tokens, target, starts)

    def _run(self, step: Callable[..., None], tokens: Tensor, target: Tensor, starts: Tensor | None) -> Tensor:
        losses: list[Tensor] = []
        first = (tokens,) if self.layout.stage == 0 else ()
        last = {"target": target, "losses": losses} if self.layout.is_last_stage else {}
        every = {} if starts is None else {"document_starts": starts}
        step(*first, return_outputs=False, **last, **every)
        return self._total(losses)

    def _cut(self, tokens: Tensor, target: Tensor, starts: Tensor | None) -> zip:
        """Micro-batches of tokens, target and starts."""
        documents = [None] * self.micro_batches if starts is None else starts.chunk(self.micro_batches)
        return zip(tokens.chunk(self.micro_batches), target.chunk(self.micro_batches), documents, strict=True)

    def _total(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.layout.device)
        for loss in losses:
            total += loss.detach()
        return total
