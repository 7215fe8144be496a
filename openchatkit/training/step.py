"""One optimizer step, taken by all ranks together: gradients summed over micro-batches and replicas, one norm.

What goes with it, by source and for the ledger, travels in the same two reductions: what was fed, counted in whole
numbers, before the step's work, and what came of it, in float64, after.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openchatkit.data.batch import IGNORE, Batch
from openchatkit.data.dataset import Dataset
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.models.stage import Stage
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.optimizer import (
    add_tied_gradients,
    gradient_of,
    learning_rate,
    squared_norms,
    sum_gradients_over_replicas,
)
from openchatkit.training.pipeline import Pipeline
from openchatkit.training.precision import LossScaler, autocast


@dataclass(frozen=True)
class SourceLoss:
    """The sum of a source's loss over those of its tokens that were trained on, and their number."""

    total: float
    trained_tokens: int

    @property
    def mean(self) -> float | None:
        """Loss a token; None without a token."""
        return self.total / self.trained_tokens if self.trained_tokens else None


def by_name(dataset: Dataset, losses: Sequence[SourceLoss]) -> dict[str, dict[str, float | None]]:
    """{source's name: {"loss", "trained_tokens"}}; a data set has no two sources of one name."""
    return {
        source.name: {"loss": loss.mean, "trained_tokens": loss.trained_tokens}
        for source, loss in zip(dataset.sources, losses, strict=True)
    }


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, equal on every rank. `loss` is the mean over the step's `trained_tokens`, NaN without any.

    `applied` is false when the gradient was not finite, or nothing was trained on: then no parameter of any rank has
    changed, nor the optimizer's state. `digest` is that of
    all the rows the step was fed, over all replicas (see `Batch.digest`); `sources` has an entry for each source.
    """

    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int
    applied: bool
    stop: bool
    digest: int
    sources: tuple[SourceLoss, ...]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the trained tokens of an evaluation (NaN without any), their number, and the same by source."""

    loss: float
    trained_tokens: int
    sources: tuple[SourceLoss, ...]


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
        self._source_losses = torch.zeros(0)
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
        digest, trained = self._count(batches, len(dataset.sources))
        self._loss_factor = self.scaler.scale / max(sum(trained), 1)

        loss = self._start_losses(dataset)
        with autocast(self.layout.device, self.dtype):
            for batch in batches:
                loss += self.pipeline.forward_backward(*self._fed(batch))
        squared_norm, loss_sum, stop, source_losses = self._reduce(loss, stop, digest)
        grad_norm = math.sqrt(squared_norm) / self.scaler.scale
        finite = math.isfinite(grad_norm)
        applied = finite and sum(trained) > 0
        lr = learning_rate(
            number,
            peak=self.schedule.peak_lr,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.schedule.total_steps,
        )
        if applied:
            self._update(grad_norm, lr)
        sources = tuple(map(SourceLoss, source_losses, trained))
        loss_mean = loss_sum / self.scaler.scale if sum(trained) else math.nan
        result = StepResult(loss_mean, grad_norm, lr, sum(trained), applied, stop, digest, sources)
        self.optimizer.zero_grad(set_to_none=True)
        if applied or not finite:
            self.scaler.update(overflow=not finite)
        return result

    def evaluate(self, dataset: Dataset, batches: int) -> Evaluation:
        """The loss over the first `batches` batches of each replica's share of `dataset`."""
        self._loss_factor = 1.0
        loss = self._start_losses(dataset).double()
        trained = torch.zeros(len(dataset.sources), dtype=torch.float64)
        rows = self.schedule.batch_size * self.layout.replicas
        with autocast(self.layout.device, self.dtype):
            for number in range(batches):
                batch = self._batch(dataset, number * rows, 0)
                # Every stage knows the labels: were each to count them, their sum over stages would be too many.
                trained += _trained_tokens([batch], len(trained)) if self.layout.is_last_stage else 0
                loss += self.pipeline.evaluate(*self._fed(batch))
        total = torch.cat([loss.view(1), trained.to(loss.device), self._source_losses])
        self.layout.sum_over_replicas(total)
        self.layout.sum_over_stages(total)
        loss_sum, *found = total.tolist()
        counts = [int(count) for count in found[: len(trained)]]
        sources = tuple(map(SourceLoss, found[len(trained) :], counts))
        return Evaluation(loss_sum / sum(counts) if sum(counts) else math.nan, sum(counts), sources)

    def _batch(self, dataset: Dataset, first_row: int, part: int) -> Batch:
        """This replica's rows of a step's part: replicas take turns batch by batch, so rows follow each other."""
        size = self.schedule.batch_size
        start = first_row + (part * self.layout.replicas + self.layout.replica) * size
        return dataset.batch(start, size)

    def _fed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """A batch's tokens, target and starts for the pipeline; the target stays on the CPU (see `VocabularyLoss`)."""
        moved = batch.to(self.layout.device)
        return moved.tokens, _target(batch), moved.document_starts

    def _count(self, batches: Sequence[Batch], sources: int) -> tuple[int, list[int]]:
        """The digest of all rows of a step, over all replicas, and the trained tokens of each source."""
        rows = sum(batch.rows for batch in batches)
        # Digests are added modulo 2^64, as sums of int64 wrap.
        digest = sum(batch.digest() for batch in batches)
        counts = torch.tensor([rows, (digest + (1 << 63)) % (1 << 64) - (1 << 63)], dtype=torch.int64)
        counts = torch.cat([counts, _trained_tokens(batches, sources)]).to(self.layout.device)
        self.layout.sum_over_replicas(counts)
        rows, digest, *trained = counts.tolist()
        assert rows == self.global_batch, f"the replicas were fed {rows} rows, a step has {self.global_batch}"
        return digest % (1 << 64), trained

    def _start_losses(self, dataset: Dataset) -> Tensor:
        """Begin to sum each source's loss anew; returns the zero that the loss of all is summed to."""
        device = self.layout.device
        self._source_losses = torch.zeros(len(dataset.sources), dtype=torch.float64, device=device)
        return torch.zeros((), dtype=torch.float32, device=device)

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        assert self._vocabulary_loss is not None, self.layout.describe()
        labels, sources = target[:, :-1], target[:, -1:].expand(-1, target.shape[1] - 1)
        return self._vocabulary_loss(hidden, labels, scale=self._loss_factor, sources=sources, sums=self._source_losses)

    def _reduce(self, loss: Tensor, stop: bool, digest: int) -> tuple[float, float, bool, list[float]]:
        """Make gradients, their squared norm, the losses and the wish to stop the same everywhere they should be."""
        parameters = list(self.stage.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                # Nothing of this step was trained on here; the other ranks still count on a gradient.
                parameter.grad = torch.zeros_like(parameter)
        sum_gradients_over_replicas(parameters, self.layout, through_cpu=self.reduce_through_cpu)
        add_tied_gradients(self.stage, self.layout)
        asked = torch.tensor([stop], dtype=torch.float64, device=loss.device)
        shared = torch.cat([loss.double().view(1), asked, self._source_losses])
        self.layout.sum_over_replicas(shared)
        # Only the last stage has a loss, only its owner a shard's norm: adding zeros is exact.
        norms = squared_norms(self.stage)
        seal = digest % (1 << 32)  # of which a float64 holds the sum over any number of stages
        shared = torch.cat([norms, torch.tensor([seal], dtype=torch.float64, device=loss.device), shared])
        self.layout.sum_over_stages(shared)
        found = shared.tolist()
        seals, loss_sum, stops, *source_losses = found[len(norms) :]
        if seals != seal * self.layout.stages:
            raise UserError(
                f"{self.layout.describe()} was fed other samples than another stage: the files that --task-name stands "
                "for differ between machines; make them the same"
            )
        return sum(found[: len(norms)]), loss_sum, stops > 0, source_losses

    def _update(self, grad_norm: float, lr: float) -> None:
        limit = self.schedule.max_grad_norm
        factor = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
        factor /= self.scaler.scale
        if factor != 1.0:
            torch._foreach_mul_([gradient_of(p) for p in self.stage.parameters()], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


def _target(batch: Batch) -> Tensor:
    """Labels, with the row's source as a last column: torch's pipelining takes one tensor of targets, cut by rows."""
    return torch.cat([batch.labels, batch.sources.unsqueeze(1)], dim=1)


def _trained_tokens(batches: Sequence[Batch], sources: int) -> Tensor:
    """The number of each source's labels that are trained on, int64 [sources]."""
    counts = torch.zeros(sources, dtype=torch.int64)
    for batch in batches:
        counts.index_add_(0, batch.sources, (batch.labels != IGNORE).sum(1))
    return counts
