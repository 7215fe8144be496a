"""Sound weights are those that a step was taken with: no checkpoint of others takes the place of theirs."""

import math
from collections.abc import Sequence
from pathlib import Path

from openchatkit.distributed.layout import Layout
from openchatkit.distributed.processes import note_progress
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.storage import storage_errors
from openchatkit.training.setup import RunProgress
from openchatkit.training.step import StepResult

# After this many steps in a row whose gradient is not finite, and that no lower loss scale could have helped, training
# does not recover by itself.
_HOPELESS = 20


class Soundness:
    """Judges a run by its steps and keeps `progress.proven` up to date; all ranks come to the same verdict.

    `root` holds the checkpoints, of which the newest `keep` stay. With `uploads_to`, so do those that are not uploaded
    to that address. The run is to end after `max_overflows` steps in a row whose gradient is not finite, and with
    `ends_at_min_scale` after one at the least loss scale.
    """

    def __init__(
        self,
        root: Path,
        progress: RunProgress,
        layout: Layout,
        *,
        keep: int,
        uploads_to: str | None = None,
        max_overflows: int | None = None,
        ends_at_min_scale: bool = False,
    ) -> None:
        self.root, self.progress, self.layout, self.keep, self.uploads_to = root, progress, layout, keep, uploads_to
        self._max_overflows, self._ends_at_min_scale = max_overflows, ends_at_min_scale
        self._first_step = progress.step + 1
        self._last_applied = progress.step  # the last step that changed weights, as far as this run knows
        self._applied = 0  # steps of this run that changed weights
        self._not_finite = 0  # steps in a row, up to the last one, whose gradient was not finite
        self._hopeless = 0  # of these, those that no lower loss scale could have helped
        self._is_exhausted = False  # whether the loss scale had to fall below the least
        self._loss_is_finite = True  # as far as is known
        self._blamed: set[str] = set()  # sources whose loss was finite in none of the steps of `_not_finite`

    def add(self, result: StepResult, *, scale_can_fall: bool, sources: Sequence[str]) -> None:
        """Judge the weights that a step was taken with. `scale_can_fall`: whether the loss scale may still become less.

        `sources` are the names of the sources whose losses the step has.
        Once a step has been taken with the weights of the last checkpoint, older checkpoints are deleted.
        """
        if result.applied:
            self._not_finite, self._hopeless, self._loss_is_finite = 0, 0, True
            self._applied += 1
            self._last_applied = self.progress.step
            self._prove()
        elif result.trained_tokens:
            self._not_finite, self._loss_is_finite = self._not_finite + 1, math.isfinite(result.loss)
            self._hopeless += not (self._loss_is_finite and scale_can_fall)
            self._is_exhausted |= self._ends_at_min_scale and result.scale_is_exhausted
            bad = {
                name
                for name, loss in zip(sources, result.sources, strict=True)
                if loss.mean is not None and not math.isfinite(loss.mean)
            }
            # Of all these steps: a source that was good in one of them is not what is wrong.
            self._blamed = bad if self._not_finite == 1 else self._blamed & bad

    def add_checkpoint(self, step: int) -> None:
        """Take note of a checkpoint that has just got its name, verified; older ones are deleted.

        Where steps with its weights have changed them, it is proven; else the one before stays beside it, and where
        none is proven all stay.
        """
        self.progress.saved = step
        note_progress(step)
        self.prune()
        self._prove()

    def prune(self) -> None:
        """Delete checkpoints that are not kept, if one is proven."""
        if self.layout.rank != 0 or self.progress.saved is None or self.progress.proven is None:
            return
        verified, protected = checkpoint.checkpoint_path(self.root, self.progress.saved), [self.progress.proven]
        with storage_errors(self.root):
            checkpoint.prune(self.root, self.keep, verified=verified, protected=protected, uploads_to=self.uploads_to)

    def _prove(self) -> None:
        """Let the last checkpoint be the proven one if a step has been applied since."""
        saved = self.progress.saved
        if saved is not None and saved != self.progress.proven and self._last_applied > saved:
            self.progress.proven = saved
            self.prune()

    @property
    def is_hopeless(self) -> bool:
        """Whether too many steps were in vain."""
        if self._max_overflows is not None:
            return self._is_exhausted or self._not_finite >= self._max_overflows
        return self._is_exhausted or self._hopeless >= _HOPELESS

    def check(self) -> None:
        """Raise UserError after too many steps in vain."""
        if self.is_hopeless:
            steps = self._max_overflows or _HOPELESS
            what = f"was not finite for {steps} steps in a row, up to step {self.progress.step}"
            if self._is_exhausted:
                what = f"was not finite at step {self.progress.step}, with the least loss scale"
            raise UserError(
                f"the gradient {what}{self._blame()}: lower --lr, use --bf16 instead of --fp16, or look at the data; "
                f"{self.go_back()}"
            )

    def check_end(self) -> None:
        """Raise UserError if none of the run's steps changed a weight, or the last ones are not saved."""
        if not self._applied:
            raise UserError(
                f"none of the steps {self._first_step} to {self.progress.step} changed a weight, since no gradient was "
                f"finite or no token trained on: look at the warnings above; {self.go_back()}"
            )
        if self.progress.saved != self.progress.step:
            raise UserError(
                f"the loss of the last {self._not_finite} steps was not finite{self._blame()}, so that nothing of them "
                f"is saved: lower --lr, or look at the data; {self.go_back()}"
            )

    def _blame(self) -> str:
        return f", nor the loss of {', '.join(sorted(self._blamed))}" if self._blamed else ""

    def may_save(self, *, last: bool) -> bool:
        """Return whether the weights may be saved: not after a step whose gradient was not finite.

        The last step's weights are saved where its loss was finite: they are those that it was computed with.
        """
        if self._not_finite == 0:
            return self._applied > 0 or self.progress.saved is not None
        return last and self._loss_is_finite and self._applied > 0

    def go_back(self) -> str:
        """Let the next run start from the last checkpoint that is known to be sound; returns a clause that names it.

        It is the newest one where the loss is finite, since no step has made its weights worse. Where so many steps
        were in vain that the run ended, it is the last one that a step was taken with.
        """
        saved, proven = self.progress.saved, self.progress.proven
        if saved is None:
            return "nothing was saved"
        if self._loss_is_finite and not self.is_hopeless:
            return f"the same command goes on from {checkpoint.checkpoint_path(self.root, saved)}"
        if proven is None:
            return f"nothing in {self.root} is known to be good"
        if self.layout.rank == 0 and saved != proven:
            checkpoint.point_to(self.root, proven)
        path = checkpoint.checkpoint_path(self.root, proven)
        return f"the same command goes on from {path}, the last one known to be good"
