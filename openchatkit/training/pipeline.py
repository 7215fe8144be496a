"""Micro-batches through this rank's stages and those of its neighbours: the one file that touches torch's pipelining.

torch 2.13 traps that are handled here: stage inputs and outputs are declared, else the first step runs one micro-batch
more to learn them; the shapes then stay fixed; gradients must not be scaled by the schedule, since the loss is already
divided by the tokens of the whole step; merged outputs would keep every micro-batch's hidden states.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import pipelining

from openchatkit.distributed.layout import Layout
from openchatkit.libraries import pytorch
from openchatkit.libraries.torch_pipelining import ObservedStage
from openchatkit.training import timing
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.schedules import SCHEDULES
from openchatkit.training.timing import StepTimer

Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """Forward and backward of a batch that is cut into micro-batches of a fixed shape.

    `loss(hidden, target)` runs on the last stage, once a micro-batch, and returns a scalar to backpropagate as it is;
    the target is one tensor with a row for each row of tokens, on whatever device `loss` wants it. `document_starts`
    and `dropout_keys` (see `Stage`) do not travel: each rank gives them to its own stages. A single stage runs a plain
    loop over the micro-batches, with the same bits. `timer` notes what runs when.
    """

    def __init__(
        self,
        stages: LocalStages,
        layout: Layout,
        *,
        schedule: str,
        micro_batches: int,
        micro_batch_size: int,
        seq_length: int,
        dtype: torch.dtype,
        loss: Loss,
    ) -> None:
        self.stages, self.layout, self.loss = stages, layout, loss
        self.timer = StepTimer(layout.device, layout.activity)
        self.micro_batches = micro_batches
        self._schedule: Any = None
        if layout.pipeline_size > 1:
            kind = SCHEDULES[schedule]
            tokens = torch.empty(micro_batch_size, seq_length, dtype=torch.int64, device="meta")
            count = len(stages.by_number) * layout.pipeline_size
            size = stages.config.hidden_size

            def declare(length: int) -> Tensor:
                shape = (micro_batch_size, length, size)
                return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

            hidden = declare(seq_length // stages.hidden_parts)
            runners = [
                ObservedStage(
                    self.timer,
                    stage,
                    number,
                    count,
                    layout.device,
                    input_args=tokens if number == 0 else hidden,
                    # What the head is given, of all tokens, does not travel.
                    output_args=declare(seq_length) if number == count - 1 else hidden,
                    group=layout.pipeline,
                )
                for number, stage in stages.by_number.items()
            ]
            # Of an error, torch would also print the whole list of actions, on every rank.
            logging.getLogger(pipelining.__name__).setLevel(logging.CRITICAL)
            make = getattr(pipelining, kind.torch_class)
            taken = runners if kind.takes_several else runners[0]
            self._schedule = make(taken, micro_batches, loss_fn=self.loss, scale_grads=False)

    def _forward(
        self, tokens: Tensor, *, document_starts: Tensor | None = None, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """Let the only stage compute. `fully_shard` would move what is on the CPU to the GPU, and wait for that."""
        [stage] = self.stages
        documents = None if document_starts is None else stage.confine(document_starts, tokens.device)
        keys = None if dropout_keys is None else pytorch.send(dropout_keys, tokens.device)
        hidden: Tensor = stage(tokens, documents, dropout_keys=keys)
        return hidden

    def forward_backward(
        self,
        tokens: Tensor,
        target: Tensor,
        document_starts: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Add the gradients of a batch, int64 [micro_batches * micro_batch_size, seq_length], to the parameters'.

        Returns the sum of the micro-batches' losses on the last stage, 0 on the others.
        """
        losses: list[Tensor] = []
        of_rows = _keep_given(document_starts=document_starts, dropout_keys=dropout_keys)
        if self._schedule is None:
            for number, (x, y, given) in enumerate(self._cut(tokens, target, of_rows)):
                with self.timer.compute(timing.FORWARD, 0, number):
                    hidden = self._forward(x, **given)
                losses.append(self.loss(hidden, y))
                del hidden  # backward needs its room
                with self.timer.compute(timing.BACKWARD, 0, number):
                    losses[-1].backward()  # type: ignore[no-untyped-call]
        else:
            inputs, options = self._arguments(tokens, target, of_rows, losses)
            with self.layout.activity.waiting():
                self._schedule.step(*inputs, **options)
        self.timer.end_batch(self.micro_batches)
        return self._total(losses)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, target: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Return the micro-batches' summed loss on the last stage, 0 on the others; gradients stay as they are.

        Nothing is dropped out.
        """
        losses: list[Tensor] = []
        of_rows = _keep_given(document_starts=document_starts)
        if self._schedule is None:
            cut = self._cut(tokens, target, of_rows)
            losses = [self.loss(self._forward(x, **given), y) for x, y, given in cut]
        else:
            inputs, options = self._arguments(tokens, target, of_rows, losses)
            with pytorch.forward_only(self._schedule), self.layout.activity.waiting():
                self._schedule.eval(*inputs, **options)
        return self._total(losses)

    def _arguments(
        self, tokens: Tensor, target: Tensor, of_rows: Mapping[str, Tensor], losses: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the arguments that torch's schedule takes here; it appends to `losses` where the last stage is."""
        inputs = (tokens,) if self.stages.has_embed else ()
        options: dict[str, Any] = {"return_outputs": False}
        if self.stages.has_head:
            options |= {"target": target, "losses": losses}
        return inputs, {**options, **of_rows}

    def _cut(
        self, tokens: Tensor, target: Tensor, of_rows: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Return the micro-batches of all."""
        number = self.micro_batches
        pieces = zip(*(values.chunk(number) for values in of_rows.values()), strict=True) if of_rows else [()] * number
        given = (dict(zip(of_rows, piece, strict=True)) for piece in pieces)
        return zip(tokens.chunk(number), target.chunk(number), given, strict=True)

    def _total(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.layout.device)
        for loss in losses:
            total += loss.detach()
        return total


def _keep_given(**of_rows: Tensor | None) -> dict[str, Tensor]:
    return {name: values for name, values in of_rows.items() if values is not None}
