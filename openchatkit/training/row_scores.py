"""How likely given tokens are, and which are the likeliest, by the projection of a model in training.

Owns the figures of rows that ask for some; whose rows they are, and what is asked, is `task_scorer`'s.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openchatkit.data.batch import IGNORE
from openchatkit.training.loss import CHUNK_TOKENS

LIKELIHOOD, MISSES, LIKELIEST = range(3)  # the columns of `sums`


class RowScores:
    """Sums over each row's labels, float64 [rows, 3]: log-likelihoods, labels that are not the likeliest token, and the
    likeliest tokens' ids.

    With a `group`, the projection has the vocabulary's rows from `first` on, and the group's ranks have the others; all
    of them get the same sums.
    """

    def __init__(
        self, projection: nn.Linear, rows: int, *, group: dist.ProcessGroup | None = None, first: int = 0
    ) -> None:
        self._projection, self._group, self._first = projection, group, first
        self.sums = torch.zeros(rows, 3, dtype=torch.float64, device=projection.weight.device)

    @torch.no_grad()
    def add(self, hidden: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Add a micro-batch: hidden [..., hidden_size], labels and the numbers of their rows [...], on the CPU.

        Labels that are IGNORE count nothing.
        """
        labels = labels.flatten()
        asked = (labels != IGNORE).nonzero().squeeze(-1)
        device = hidden.device
        places, labels, rows = (values.to(device) for values in (asked, labels[asked], rows.flatten()[asked]))
        hidden = hidden.flatten(0, -2)[places]
        for start in range(0, len(labels), CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            figures = self._score(hidden[piece], labels[piece])
            self.sums.index_add_(0, rows[piece], figures)

    def _score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the three figures of each token, float64 [tokens, 3]."""
        logits = self._projection(hidden).float()  # [tokens, rows of the vocabulary here]
        largest, likeliest = logits.max(-1)
        here = labels - self._first
        inside = (here >= 0) & (here < logits.shape[-1])
        label = logits.gather(1, here.clamp(0, logits.shape[-1] - 1).unsqueeze(1)).squeeze(1).where(inside, 0.0)
        likeliest = likeliest + self._first
        everywhere = largest
        if self._group is not None:
            everywhere = largest.clone()
            dist.all_reduce(everywhere, dist.ReduceOp.MAX, group=self._group)
            # Of equal logits the first counts, as within a rank.
            likeliest = torch.where(largest == everywhere, likeliest, torch.iinfo(torch.int64).max)
            dist.all_reduce(likeliest, dist.ReduceOp.MIN, group=self._group)
        sums = torch.stack([(logits - everywhere.unsqueeze(-1)).exp().sum(-1), label])
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        likelihood = sums[1] - everywhere - sums[0].log()
        return torch.stack([likelihood.double(), (labels != likeliest).double(), likeliest.double()], dim=1)
