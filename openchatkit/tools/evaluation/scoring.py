"""Log-likelihoods and greedy text from a model of ours, as lm-eval asks for them.

`StageScorer` computes and knows nothing of lm-eval; `as_lm` gives it, or the scorer of a training, lm-eval's interface.
There is no sampling: convert a model first to sample from it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.models.generation import greedy
from openchatkit.models.stage import Stage
from openchatkit.progress import bar

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

    from openchatkit.training.task_scorer import TaskScorer

# lm-eval's own default for tasks that do not say how much to generate.
_MAX_NEW_TOKENS = 256
_T = TypeVar("_T")
_R = TypeVar("_R")


class StageScorer:
    """A whole model on one device, and how many rows it is given at a time."""

    def __init__(self, stage: Stage, device: torch.device, *, batch_size: int) -> None:
        self.stage, self.device, self.batch_size = stage, device, batch_size
        self.max_length = stage.config.max_position_embeddings

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score pairs (context, continuation) of token ids, neither empty.

        Returns the log-likelihood of each continuation, and whether greedy decoding gives it. Pairs longer than the
        model's context lose tokens from the left.
        """

        def score_batch(batch: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            rows = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in batch]
            hidden = self._hidden([row[:-1] for row in rows])
            scored = []
            for place, (row, (_, continuation)) in enumerate(zip(rows, batch, strict=True)):
                count = min(len(continuation), len(row) - 1)
                # Only these positions are projected: logits of whole rows would fill more memory than the model.
                logits = self.stage.logits(hidden[place, len(row) - 1 - count : len(row) - 1]).float()
                target = torch.tensor(row[-count:], device=self.device)
                values = logits.log_softmax(-1).gather(1, target.unsqueeze(1))
                scored.append((values.sum().item(), bool((logits.argmax(-1) == target).all())))
            return scored

        return self._in_batches(pairs, lambda pair: len(pair[0]) + len(pair[1]), score_batch, "scoring")

    @torch.inference_mode()
    def generate(
        self,
        contexts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        end_of_text: int,
        is_done: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """Continue each context by its most probable tokens; see `models/generation.py:greedy`."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task generates {max_new_tokens} tokens, the model's context is {self.max_length}: leave that task "
                "out, or set max_gen_toks in a task file of your own"
            )
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": (end_of_text,), "is_done": is_done}
        return self._in_batches(
            contexts,
            len,
            lambda batch: greedy(self.stage, [context[-room:] for context in batch], **options),
            "generating",
        )

    def _hidden(self, rows: Sequence[list[int]]) -> Tensor:
        """Return hidden states [rows, longest, hidden_size]. Padding goes to the right, where no token sees it."""
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        return self.stage(padded)

    def _in_batches(
        self, rows: Sequence[_T], length: Callable[[_T], int], action: Callable[[list[_T]], list[_R]], name: str
    ) -> list[_R]:
        """Call `action` with batches of rows of like length, the longest first: a batch that is too big fails early."""
        order = sorted(range(len(rows)), key=lambda number: -length(rows[number]))
        results: dict[int, _R] = {}
        with bar(len(order), name, unit="row") as progress:
            for first in range(0, len(order), self.batch_size):
                numbers = order[first : first + self.batch_size]
                results.update(zip(numbers, action([rows[number] for number in numbers]), strict=True))
                progress.update(len(numbers))
        return [results[number] for number in range(len(rows))]


def as_lm(scorer: "StageScorer | TaskScorer", tokenizer: "PreTrainedTokenizerBase") -> "LM":
    """Return lm-eval's language model around a scorer; text becomes tokens as it does for the converted model."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class StageLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer.encode(string, **options)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            pairs, owners = [], []
            for owner, request in enumerate(requests):
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=scorer.max_length,
                    context_len=1,
                )
                mine = [make_disjoint_window(window) for window in windows]
                pairs += mine
                owners += [owner] * len(mine)
            totals = [0.0] * len(requests)
            for owner, (value, _is_greedy) in zip(owners, scorer.score(pairs), strict=True):
                totals[owner] += value
            return totals

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            kinds: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                kinds.setdefault(repr(request.args[1]), []).append(number)
            texts = [""] * len(requests)
            for numbers in kinds.values():
                options = normalize_gen_kwargs(requests[numbers[0]].args[1], _MAX_NEW_TOKENS)
                if options.get("do_sample"):
                    raise UserError(
                        "a task samples its answers, which needs a Hugging Face model: convert this one with "
                        "tools/convert_to_hf_gptneox.py, or leave that task out"
                    )
                stops = [stop for stop in options["until"] if stop]
                rows = scorer.generate(
                    # A task may ask without any text; something must go before the first token.
                    [self.tok_encode(requests[number].args[0]) or [self.prefix_token_id] for number in numbers],
                    max_new_tokens=options["max_gen_toks"],
                    end_of_text=self.eot_token_id,
                    is_done=functools.partial(_has_stop, stops),
                )
                for number, ids in zip(numbers, rows, strict=True):
                    texts[number] = _cut(_text(ids), stops)
            return texts

    def _text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def _has_stop(stops: Sequence[str], ids: list[int]) -> bool:
        return any(stop in _text(ids) for stop in stops)

    return StageLM()


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first of the strings that end it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
