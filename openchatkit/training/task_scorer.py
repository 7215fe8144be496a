"""Answers of a model in training to evaluation tasks, by all its ranks: likelihoods, and the likeliest text.

Rank 0 asks, and the others `serve`: each answer is one pass of the pipeline, in whatever layout the run has. Owns the
rows of such a pass; the tasks themselves are not known here.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from openchatkit.data.batch import IGNORE
from openchatkit.errors import UserError
from openchatkit.training.row_scores import LIKELIEST, LIKELIHOOD, MISSES
from openchatkit.training.step import Trainer

TaskEvaluation = Callable[["TaskScorer"], dict[str, float]]
"""Puts tasks to a model, on rank 0: their metrics by name."""

_Row = tuple[list[int], int]  # tokens, of which the last so many are asked for


class StopRequested(Exception):
    """A rank was asked to stop: the evaluation ends without a result."""


class TaskScorer:
    """A model in training, to which rank 0 puts questions. `requests` holds what asks this rank to stop, if anything.

    Rows are at most `max_length` tokens, and one more of which nothing follows.
    """

    def __init__(self, trainer: Trainer, requests: Sequence[int]) -> None:
        self._trainer, self._requests, self._ended = trainer, requests, False
        self.max_length = trainer.seq_length
        self._rows = trainer.schedule.batch_size * trainer.layout.replicas  # of a pass

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score pairs (context, continuation) of token ids, neither empty.

        Returns the log-likelihood of each continuation, and whether greedy decoding gives it. Pairs that are too long
        lose tokens from the left.
        """
        rows = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in pairs]
        asked = [min(len(each), len(row) - 1) for row, (_, each) in zip(rows, pairs, strict=True)]
        figures = self._ask(list(zip(rows, asked, strict=True)))
        return [(each[LIKELIHOOD], each[MISSES] == 0) for each in figures]

    def generate(
        self,
        contexts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        end_of_text: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """Continue each context by its most probable tokens, up to end of text, which is no part of a result.

        Each token takes a pass over the whole rows: a pipeline in training keeps nothing.
        """
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task generates {max_new_tokens} tokens, training reads {self.max_length}: leave that task out"
            )
        new: list[list[int]] = [[] for _ in contexts]
        going = list(range(len(contexts)))
        for _ in range(max_new_tokens):
            # The last token of a row is only a label, which does not count here.
            figures = self._ask([([*contexts[each][-room:], *new[each], 0], 1) for each in going])
            for each, figure in zip(tuple(going), figures, strict=True):
                token = int(figure[LIKELIEST])
                if token != end_of_text:
                    new[each].append(token)
                if token == end_of_text or is_done(new[each]):
                    going.remove(each)
            if not going:
                break
        return new

    def serve(self) -> None:
        """Take part in the passes that rank 0 asks for, until it asks for no more."""
        while (rows := self._share(None)) is not None:
            self._pass(rows)

    @contextlib.contextmanager
    def asking(self) -> Iterator["TaskScorer"]:
        """Let rank 0 ask; at the end the others learn that no more follows."""
        try:
            yield self
        finally:
            if not self._ended:
                self._share(None)

    def _ask(self, rows: Sequence[_Row]) -> list[list[float]]:
        """Return the figures of rows, which all ranks compute. StopRequested if one was asked to stop."""
        figures: list[list[float]] = []
        for start in range(0, len(rows), self._rows):
            shared = self._share(list(rows[start : start + self._rows]))
            if shared is None:
                raise StopRequested
            figures += self._pass(shared)
        return figures

    def _share(self, rows: list[_Row] | None) -> list[_Row] | None:
        """Return rank 0's rows on all ranks; None at the end, or where a rank was asked to stop."""
        shared: list[tuple[list[_Row] | None, bool]] = self._trainer.layout.gather((rows, bool(self._requests)))
        asked = None if any(stop for _, stop in shared) else shared[0][0]
        self._ended |= asked is None
        return asked

    def _pass(self, rows: list[_Row]) -> list[list[float]]:
        tokens = torch.zeros(self._rows, self.max_length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        for number, (row, asked) in enumerate(rows):
            end = len(row) - 1
            tokens[number, :end] = torch.tensor(row[:-1])
            labels[number, end - asked : end] = torch.tensor(row[-asked:])
        figures: list[list[float]] = self._trainer.score(tokens, labels).tolist()
        return figures[: len(rows)]
