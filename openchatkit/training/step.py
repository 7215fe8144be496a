"""One optimizer step, taken by all ranks together: gradients summed over micro-batches and replicas, one norm."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openchatkit.data.batch import IGNORE, Batch
from openchatkit.data.dataset import Dataset
from openchatkit.distributed.layout import Layout
from openchatkit.models.stage import Stage
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.optimizer import (
    add_tied_gradients,
    learning_rate,
    squared_norms,
    sum_gradients_over_replicas,
)
from openchatkit.training.pipeline import Pipeline
from openchatkit.training.precision import LossScaler, autocast


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, equal on every rank. `loss` is the mean over the step's `trained_tokens`.

    `applied` is false when the gradient was not finite: then no parameter of any rank has changed.
    """

    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int
    applied: bool
    stop: bool


@dataclass(frozen=True)
class Schedule:
    """How many rows a step takes, and its learning rate. `batch_size` is per replica and batch."""

    batch_size: int
    accumulate: int
    peak_lr: float
    warmup_steps: int
    total_steps: int
    max_grad_norm: float


class Trainer:
    """A stage, what optimizes it, and the step that all ranks take together."""

    def __init__(
        self,
        stage: Stage,
        layout: Layout,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        schedule: Schedule,
        *,
        dtype: torch.dtype,
        pp_mode: str,
        micro_batch_size: int,
        seq_length: int,
        reduce_through_cpu: bool,
    ) -> None:
        self.stage, self.layout, self.optimizer, self.scaler, self.schedule = stage, layout, optimizer, scaler, schedule
        self.dtype, self.reduce_through_cpu = dtype, reduce_through_cpu
        self._loss_factor = 1.0
        self._vocabulary_loss = VocabularyLoss(stage.projection) if layout.is_last_stage else None
        self.pipeline = Pipeline(
            stage,
            layout,
            schedule=pp_mode,
            micro_batches=schedule.batch_size // micro_batch_size,
            micro_batch_size=micro_batch_size,
            seq_length=seq_length,
            dtype=dtype,
            loss=self._loss,
        )

    @property
    def global_batch(self) -> int:
        """Rows that one step trains, over all replicas."""
        return self.schedule.batch_size * self.schedule.accumulate * self.layout.replicas

    def step(self, number: int, dataset: Dataset, *, stop: bool = False) -> StepResult:
        """Take step `number`, counted from 0. `stop` on any rank becomes `stop` of the result on all."""
        batches = [self._batch(dataset, number * self.global_batch, part) for part in range(self.schedule.accumulate)]
        trained = torch.stack([(batch.labels != IGNORE).sum() for batch in batches]).sum()
        self.layout.sum_over_replicas(trained)
        trained_tokens = int(trained)
        self._loss_factor = self.scaler.scale / max(trained_tokens, 1)

        loss = torch.zeros((), dtype=torch.float32, device=self.layout.device)
        with autocast(self.layout.device, self.dtype):
            for batch in batches:
                loss += self.pipeline.forward_backward(batch.tokens, batch.labels)
        squared_norm, loss_sum, stop = self._reduce(loss, stop)
        grad_norm = math.sqrt(squared_norm) / self.scaler.scale
        applied = math.isfinite(grad_norm)
        lr = learning_rate(
            number,
            peak=self.schedule.peak_lr,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.schedule.total_steps,
        )
        if applied:
            self._update(grad_norm, lr)
        result = StepResult(loss_sum / self.scaler.scale, grad_norm, lr, trained_tokens, applied, stop)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(overflow=not applied)
        return result

    def evaluate(self, dataset: Dataset, batches: int) -> tuple[float, int]:
        """Mean loss over the first `batches` batches of each replica's share of `dataset`, and its tokens."""
        self._loss_factor = 1.0
        total = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        rows = self.schedule.batch_size * self.layout.replicas
        with autocast(self.layout.device, self.dtype):
            for number in range(batches):
                batch = self._batch(dataset, number * rows, 0)
                total[0] += self.pipeline.evaluate(batch.tokens, batch.labels)
                total[1] += (batch.labels != IGNORE).sum() if self.layout.is_last_stage else 0
        self.layout.sum_over_replicas(total)
        self.layout.sum_over_stages(total)
        loss, tokens = total.tolist()
        return loss / max(tokens, 1.0), int(tokens)

    def _batch(self, dataset: Dataset, first_row: int, part: int) -> Batch:
        """This replica's rows of a step's part: replicas take turns batch by batch, so rows follow each other."""
        size = self.schedule.batch_size
        start = first_row + (part * self.layout.replicas + self.layout.replica) * size
        return dataset.batch(start, size).to(self.layout.device)

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        assert self._vocabulary_loss is not None, self.layout.describe()
        return self._vocabulary_loss(hidden, labels, scale=self._loss_factor)

    def _reduce(self, loss: Tensor, stop: bool) -> tuple[float, float, bool]:
        """Make gradients, their squared norm, the loss and the wish to stop the same everywhere they should be."""
        parameters = list(self.stage.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                # Nothing of this step was trained on here; the other ranks still count on a gradient.
                parameter.grad = torch.zeros_like(parameter)
        sum_gradients_over_replicas(parameters, self.layout, through_cpu=self.reduce_through_cpu)
        add_tied_gradients(self.stage, self.layout)
        shared = torch.stack([loss.double(), torch.tensor(float(stop), dtype=torch.float64, device=loss.device)])
        self.layout.sum_over_replicas(shared)
        # Only the last stage has a loss, only its owner a shard's norm: adding zeros is exact.
        shared = torch.cat([squared_norms(self.stage), shared])
        self.layout.sum_over_stages(shared)
        *norms, loss_sum, stops = shared.tolist()
        return sum(norms), loss_sum, stops > 0

    def _update(self, grad_norm: float, lr: float) -> None:
        limit = self.schedule.max_grad_norm
        factor = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
        factor /= self.scaler.scale
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in self.stage.parameters()], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
