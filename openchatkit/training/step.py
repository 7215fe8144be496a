"""One optimizer step, taken by all ranks together: gradients summed over micro-batches and replicas, one norm.

Numbers of the step are added up twice: those of its rows, as integers, before the forward passes, and those of losses
and gradients, in float64, after the backward passes.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openchatkit.data.batch import IGNORE, Batch
from openchatkit.data.dataset import Dataset
from openchatkit.data.prefetch import Prefetcher, make_thread
from openchatkit.errors import UserError
from openchatkit.libraries import pytorch
from openchatkit.models.dropout import row_keys
from openchatkit.training import timing
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.loss import VocabularyLoss
from openchatkit.training.perplexity import to_perplexity
from openchatkit.training.pipeline import Pipeline
from openchatkit.training.precision import LossScaler, autocast
from openchatkit.training.rank_weights import RankWeights
from openchatkit.training.row_scores import RowScores


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
    """Return {source's name: {"loss", "trained_tokens"}}; a data set has no two sources of one name."""
    return {
        source.name: {"loss": loss.mean, "trained_tokens": loss.trained_tokens}
        for source, loss in zip(dataset.sources, losses, strict=True)
    }


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, equal on every rank. `loss` is the mean over the step's `trained_tokens`, NaN without any.

    `applied` is false when the gradient was not finite, or nothing was trained on: then no parameter of any rank has
    changed, nor the optimizer's state. `digest` is that of all the step's rows, over all replicas (see `Batch.digest`);
    `sources` has an entry for each source. `saving`: some rank was writing a checkpoint when the step began.
    `data_seconds` is how long a rank waited for its rows, in the mean over all ranks.
    `shard_grad_norms` are those of the parts of the model, in the order of its shards.
    `scale_is_exhausted`: the gradient overflowed where the loss scale would have had to fall below the least.
    """

    loss: float
    grad_norm: float
    lr: float
    trained_tokens: int
    applied: bool
    stop: bool
    digest: int
    sources: tuple[SourceLoss, ...]
    saving: bool = False
    data_seconds: float = 0.0
    scale_is_exhausted: bool = False
    shard_grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over the trained tokens of an evaluation (NaN without any), their number, and the same by source."""

    loss: float
    trained_tokens: int
    sources: tuple[SourceLoss, ...]

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return to_perplexity(self.loss)


@dataclass(frozen=True)
class Schedule:
    """Rows of a step, and its learning rate by the step. `batch_size` is per replica and batch."""

    batch_size: int
    accumulate: int
    rates: LearningRates
    total_steps: int
    max_grad_norm: float


@dataclass(frozen=True)
class _StepRows:
    """This replica's rows of a step, and the sum of their digests as the data set has them."""

    batches: list[Batch]
    digest: int


@dataclass(frozen=True)
class _StepSums:
    """Numbers of a step, summed over micro-batches and ranks; `loss` and gradients are times the loss scale."""

    loss: float
    stop: bool
    saving: bool
    source_losses: list[float]
    squared_norms: list[float]
    data_seconds: float = 0.0


class Trainer:
    """The stages of a rank with their optimizer, and the step that all ranks take together; `seed` is of dropout."""

    def __init__(
        self,
        weights: RankWeights,
        scaler: LossScaler,
        schedule: Schedule,
        *,
        dtype: torch.dtype,
        pp_mode: str,
        micro_batch_size: int,
        seq_length: int,
        seed: int = 0,
    ) -> None:
        self.weights, self.scaler, self.schedule, self.dtype = weights, scaler, schedule, dtype
        self.stages, self.layout = weights.stages, weights.layout
        self._seed, self._loss_factor = seed, 1.0
        self._source_losses = torch.zeros(0)
        self._row_scores: RowScores | None = None  # of the rows that are scored, where that is done now
        self.seq_length = seq_length
        self._vocabulary_loss: VocabularyLoss | None = None
        if self.stages.has_head:
            first_row = self.stages.part.first(self.stages.config.vocab_size)
            group = self.layout.tensor
            self._vocabulary_loss = VocabularyLoss(self.stages.projection, group=group, first=first_row)
        thread = make_thread(self.layout.device)
        self._step_rows = Prefetcher(self._read_step, thread)
        self._evaluation_batches = Prefetcher(self._read_evaluation, thread)
        micro_batches = schedule.batch_size // micro_batch_size
        weights.expect_passes(micro_batches * schedule.accumulate)
        self.pipeline = Pipeline(
            self.stages,
            self.layout,
            schedule=pp_mode,
            micro_batches=micro_batches,
            micro_batch_size=micro_batch_size,
            seq_length=seq_length,
            dtype=dtype,
            loss=self._loss,
        )

    @property
    def global_batch(self) -> int:
        """Rows that one step trains, over all replicas."""
        return self.schedule.batch_size * self.schedule.accumulate * self.layout.replicas

    def step(self, number: int, dataset: Dataset, *, stop: bool = False, saving: bool = False) -> StepResult:
        """Take step `number`, counted from 0. `stop` and `saving` of any rank become those of the result on all."""
        timer = self.pipeline.timer
        timer.start_step()
        self.layout.activity.begin("step", step=number + 1)
        with timer.on_host(timing.DATA):
            following = (dataset, number + 1) if number + 1 < self.schedule.total_steps else None
            rows = self._step_rows.take((dataset, number), following=following)
        digest, trained = self._count(rows, len(dataset.sources))
        trained_tokens = sum(trained)

        loss = self._start_losses(dataset, factor=self.scaler.scale / max(trained_tokens, 1))
        with autocast(self.layout.device, self.dtype):
            for batch in rows.batches:
                loss += self.pipeline.forward_backward(*self._place(batch), self._make_dropout_keys(batch))
        with timer.compute(timing.REDUCE), self.layout.activity.waiting():
            self.weights.reduce_gradients()
        with timer.compute(timing.NORM), self.layout.activity.waiting():
            sums = self._sum_over_ranks(loss, (stop, saving), digest)

        grad_norm = math.sqrt(sum(sums.squared_norms)) / self.scaler.scale
        finite = math.isfinite(grad_norm)
        applied = finite and trained_tokens > 0
        lr = self.schedule.rates.at(number)
        if applied:
            with timer.compute(timing.UPDATE):
                self._update(grad_norm, lr)
        self.weights.drop_gradients()
        result = StepResult(
            loss=sums.loss / self.scaler.scale if trained_tokens else math.nan,
            grad_norm=grad_norm,
            lr=lr,
            trained_tokens=trained_tokens,
            applied=applied,
            stop=sums.stop,
            digest=digest,
            sources=tuple(map(SourceLoss, sums.source_losses, trained)),
            saving=sums.saving,
            data_seconds=sums.data_seconds / self.layout.world_size,
            scale_is_exhausted=not finite and self.scaler.is_exhausted,
            shard_grad_norms=tuple(math.sqrt(square) / self.scaler.scale for square in sums.squared_norms),
        )
        if applied or not finite:
            self.scaler.update(overflow=not finite)
        return result

    def evaluate(self, dataset: Dataset, batches: int, *, first: int = 0) -> Evaluation:
        """Return the loss over `batches` batches of each replica's share of `dataset`, from number `first` on."""
        loss = self._start_losses(dataset, factor=1.0).double()
        trained = torch.zeros(len(dataset.sources), dtype=torch.float64)
        with autocast(self.layout.device, self.dtype):
            for number in range(first, first + batches):
                following = (dataset, number + 1) if number + 1 < first + batches else None
                batch = self._evaluation_batches.take((dataset, number), following=following)
                # Every rank knows the labels: were each to count them, their sum over a pipeline would be too many.
                trained += _trained_tokens([batch], len(trained)) if self.stages.has_head else 0
                loss += self.pipeline.evaluate(*self._place(batch))
        self.weights.release_copies()
        shares = {"loss": loss, "trained": trained.to(loss.device), "source_losses": self._source_losses}
        sums = _to_host(self._add_up(shares, self.layout.sum_over_replicas, self.layout.sum_over_pipeline))
        counts = [int(count) for count in sums["trained"]]
        mean = sums["loss"][0] / sum(counts) if sum(counts) else math.nan
        return Evaluation(mean, sum(counts), tuple(map(SourceLoss, sums["source_losses"], counts)))

    def score(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the sums of `RowScores` over the labels of rows, int64 [rows, seq_length], on all ranks.

        There are as many rows as a batch of all replicas has; labels that are IGNORE count nothing.
        """
        size, first = self.schedule.batch_size, self.layout.replica * self.schedule.batch_size
        rows = size * self.layout.replicas
        assert tokens.shape == labels.shape == (rows, self.seq_length), f"{tokens.shape}, {labels.shape}"
        sums = torch.zeros(rows, 3, dtype=torch.float64, device=self.layout.device)
        if self._vocabulary_loss is not None:
            of = self._vocabulary_loss
            self._row_scores = RowScores(of.projection, rows, group=of.group, first=of.first)
            sums = self._row_scores.sums
        target = torch.cat([labels, torch.arange(rows).unsqueeze(1)], dim=1)[first : first + size]
        try:
            with autocast(self.layout.device, self.dtype):
                self.pipeline.evaluate(pytorch.send(tokens[first : first + size], self.layout.device), target)
        finally:
            self._row_scores = None
        self.weights.release_copies()
        self.layout.sum_over_replicas(sums)
        self.layout.sum_over_pipeline(sums)
        return sums

    def _read_step(self, step: tuple[Dataset, int]) -> _StepRows:
        """Return this replica's rows of a step, which is given by the data set and its number."""
        (dataset, number), parts = step, self.schedule.accumulate
        batches = [self._read(dataset, number * parts + part) for part in range(parts)]
        return _StepRows([self._prepare(batch) for batch in batches], sum(batch.digest() for batch in batches))

    def _read_evaluation(self, batch: tuple[Dataset, int]) -> Batch:
        """Return this replica's rows of a batch of an evaluation."""
        return self._prepare(self._read(*batch))

    def _read(self, dataset: Dataset, number: int) -> Batch:
        """Return this replica's batch `number`. Replicas take turns by the batch, so rows of a step follow on."""
        size = self.schedule.batch_size
        return dataset.batch((number * self.layout.replicas + self.layout.replica) * size, size)

    def _prepare(self, batch: Batch) -> Batch:
        merged = batch.merge_padding()
        return merged.pin() if self.layout.device.type == "cuda" else merged

    def _place(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens, target, document starts for the pipeline; `VocabularyLoss`, `Stage` want the last two here."""
        return pytorch.send(batch.tokens, self.layout.device), _target(batch), batch.document_starts

    def _make_dropout_keys(self, batch: Batch) -> Tensor | None:
        """Return the keys of a batch's rows, which no other step has, where the model drops out."""
        return row_keys(self._seed, batch.first, batch.rows) if self.stages.config.options.drops_out else None

    def _count(self, rows: _StepRows, sources: int) -> tuple[int, list[int]]:
        """Return the digest of all rows of a step, over all replicas, and the trained tokens of each source.

        The processors do it by themselves: a GPU is still busy with the step before.
        """
        # Digests are added modulo 2^64, as sums of int64 wrap.
        digest = (rows.digest + (1 << 63)) % (1 << 64) - (1 << 63)
        shares = {
            "rows": torch.tensor(sum(batch.rows for batch in rows.batches)),
            "digest": torch.tensor(digest),
            "trained": _trained_tokens(rows.batches, sources),
        }
        counts = _to_host(self._add_up(shares, self.layout.sum_over_replicas))
        [total], [digest] = counts["rows"], counts["digest"]
        assert total == self.global_batch, f"the replicas were given {total} rows, a step has {self.global_batch}"
        return digest % (1 << 64), counts["trained"]

    def _start_losses(self, dataset: Dataset, *, factor: float) -> Tensor:
        """Start each source's sum of losses; returns the 0 that the loss of all is added to, times `factor`."""
        device = self.layout.device
        self._loss_factor = factor
        self._source_losses = torch.zeros(len(dataset.sources), dtype=torch.float64, device=device)
        return torch.zeros((), dtype=torch.float32, device=device)

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        assert self._vocabulary_loss is not None, self.layout.describe()
        labels, sources = target[:, :-1], target[:, -1:].expand(-1, target.shape[1] - 1)
        if self._row_scores is not None:
            self._row_scores.add(hidden, labels, sources)
            return hidden.new_zeros(())
        with self.pipeline.timer.compute(timing.LOSS):
            return self._vocabulary_loss(
                hidden, labels, scale=self._loss_factor, sources=sources, sums=self._source_losses
            )

    def _sum_over_ranks(self, loss: Tensor, votes: Sequence[bool], digest: int) -> _StepSums:
        """Add up this rank's numbers of a step with the others'. UserError where ranks of a replica had other samples.

        Only the rank with the head has losses, and a shard's norm only the one with the shard: adding zeros is exact.
        """
        end_of_digest = digest % (1 << 32)  # a float64 holds the sum of these over any number of ranks
        loss = loss.double()
        counts = [*votes, self.pipeline.timer.seconds(timing.DATA)]
        numbers = torch.tensor([*counts, end_of_digest], dtype=torch.float64)
        of_counts, of_digest = torch.split(pytorch.send(numbers, loss.device), [len(counts), 1])
        shares = {"counts": of_counts, "ends_of_digests": of_digest, "squared_norms": self.weights.squared_norms()}
        of_parts = self._add_up(shares, self.layout.sum_over_parts)
        # Parts have the same losses, and replicas the same norms.
        shares = {"loss": loss, "source_losses": self._source_losses, "counts": of_parts.pop("counts")}
        of_replicas = self._add_up(shares, self.layout.sum_over_replicas)
        sums = _to_host(self._add_up(of_parts | of_replicas, self.layout.sum_over_pipeline))
        if sums["ends_of_digests"] != [end_of_digest * self.layout.pipeline_size * self.layout.tensor_size]:
            raise UserError(
                f"{self.layout.describe()} was fed other samples than another rank of its replica: the files that "
                "--task-name stands for differ between machines; make them the same"
            )
        return _StepSums(
            loss=sums["loss"][0],
            stop=sums["counts"][0] > 0,
            saving=sums["counts"][1] > 0,
            data_seconds=sums["counts"][2],
            source_losses=sums["source_losses"],
            squared_norms=sums["squared_norms"],
        )

    def _add_up(self, shares: Mapping[str, Tensor], *all_reduces: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Sum named tensors of one dtype, on one device, by one call of each all-reduce; returns the sums, flat."""
        flat = torch.cat([share.flatten() for share in shares.values()])
        for all_reduce in all_reduces:
            all_reduce(flat)
        return dict(zip(shares, torch.split(flat, [share.numel() for share in shares.values()]), strict=True))

    def _update(self, grad_norm: float, lr: float) -> None:
        limit = self.schedule.max_grad_norm
        factor = min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0
        self.weights.step(factor / self.scaler.scale, lr)


def _to_host(sums: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return the numbers of flat tensors of one dtype, on one device, by one transfer: each waits for the device."""
    numbers = iter(torch.cat(list(sums.values())).tolist())
    return {name: list(itertools.islice(numbers, part.numel())) for name, part in sums.items()}


def _target(batch: Batch) -> Tensor:
    """Return the labels with the row's source as last column: torch's pipelining cuts one tensor of targets by rows."""
    return torch.cat([batch.labels, batch.sources.unsqueeze(1)], dim=1)


def _trained_tokens(batches: Sequence[Batch], sources: int) -> Tensor:
    """Return the number of each source's labels that are trained on, int64 [sources]."""
    counts = torch.zeros(sources, dtype=torch.int64)
    for batch in batches:
        counts.index_add_(0, batch.sources, (batch.labels != IGNORE).sum(1))
    return counts
