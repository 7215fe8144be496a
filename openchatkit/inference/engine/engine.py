"""The decode loop: prompt token ids in, reply token ids out, one at a time.

Owns what is read when, the choice of the next token, and what ends a reply by token. Text, stop strings and turns are
not known here. The model is any causal language model of transformers; its `generate()` is the test oracle.

What was read stays read: a prompt that begins as an earlier text did, reply included, is read from where they part.
So undoing, regenerating and editing need no call, and a turn costs its own tokens.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from loguru import logger
from transformers import PreTrainedModel

from openchatkit.errors import UserError
from openchatkit.inference.engine import static
from openchatkit.inference.engine.lookup import Lookup
from openchatkit.inference.engine.reading import Pool, Reader, Slot
from openchatkit.inference.engine.sampling import Sampling, check_finite, choose, mark_seen


class OutOfMemory(UserError):
    """The device has no room for this reply; the model itself is unharmed."""


@dataclass
class Statistics:
    """What one reply took. Times are seconds of wall clock; `cached_tokens` of the prompt had been read before.

    `accepted_tokens` of the `drafted_tokens` guessed by prompt lookup were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Engine:
    """A loaded model and how to make it go on. `device` is where its inputs belong.

    Keys and values of what it has read are kept between calls, for up to `slots` different texts, in `cache_dtype`
    (None: the model's). `compile` asks for the compiled step of static.py, which keeps one text whatever `slots` says
    (None: where a GPU runs it and the model allows it). One reply at a time: beginning another ends the one before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Collection[int],
        device: torch.device,
        cache_dtype: torch.dtype | None = None,
        slots: int = 1,
        compile: bool | None = None,
        compile_options: dict[str, object] | None = None,
    ) -> None:
        self._model = model
        self._eos_ids = frozenset(eos_ids)
        self._device = device
        suits = compile is not False and static.suits(model, self.context_length)
        if compile and not suits:
            logger.warning("this model cannot be compiled as a whole and runs uncompiled")
        if suits and (compile or device.type == "cuda"):
            self._reader = static.StaticReader(model, device=device, limit=self.context_length, options=compile_options)
            # Each cache of fixed place would be compiled for anew.
            slots = 1
        else:
            self._reader = Reader(model, device=device, dtype=cache_dtype, limit=self.context_length)
        self._pool = Pool(self._reader, slots)

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model was made to read at once, or None where it does not say."""
        return getattr(self._model.config, "max_position_embeddings", None)

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        generator: torch.Generator | None = None,
        *,
        statistics: Statistics | None = None,
        lookup: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[int]:
        """Yield at most `sampling.max_tokens` new token ids; end-of-text ends them and is not yielded.

        The context's end ends them too. `generator` is a CPU generator, so that a seed means the same draws on every
        device. `statistics` is filled in as tokens come. `lookup` guesses tokens ahead from the prompt, which pays when
        the reply quotes it; it changes the speed alone, but for the rounding of several tokens computed at once.
        `cancelled` is asked before each part of a long prompt is read, and ends the reply there; once tokens come, the
        caller closes the iterator instead. Raises OutOfMemory, and UserError when the model's output is not a number.
        """
        statistics = statistics or Statistics()
        statistics.prompt_tokens = len(prompt)
        started = time.perf_counter()
        slot = self._begin(prompt)
        user = slot.user = object()
        statistics.cached_tokens = len(slot.tokens)
        most = most_tokens(len(prompt), sampling.max_tokens, self.context_length)
        guesses = Lookup(prompt, length=self._reader.draft_length) if lookup and self._reader.croppable else None
        draft: list[int] = []
        row = 0
        with self._freeing():
            logits = slot.read(prompt[len(slot.tokens) :], cancelled=cancelled)  # [1 + draft, vocabulary]
        if logits is None:
            return
        seen = None if sampling.repetition_penalty == 1 else mark_seen(prompt, logits)
        while True:
            with self._freeing():
                token = choose(logits[row], sampling, generator, seen)
            statistics.seconds = time.perf_counter() - started
            statistics.first_token_seconds = statistics.first_token_seconds or statistics.seconds
            if token in self._eos_ids:
                return
            guessed = row < len(draft) and token == draft[row]
            statistics.accepted_tokens += guessed
            statistics.new_tokens += 1
            yield token
            if statistics.new_tokens >= most:
                return
            if seen is not None:
                seen[token] = True
            if guesses is not None:
                guesses.append(token)
            if guessed:
                row += 1
                continue
            if draft:
                guesses.judge(len(draft), row)
            if guesses is not None:
                draft = guesses.draft(most - statistics.new_tokens - 1)
                statistics.drafted_tokens += len(draft)
            assert slot.user is user, "another reply was begun before this one was done"
            # What was guessed wrongly stands behind what was right.
            slot.truncate(len(prompt) + statistics.new_tokens - 1)
            with self._freeing():
                logits, row = slot.read([token, *draft], 1 + len(draft)), 0

    def log_likelihoods(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """For each continuation, the sum over its tokens of log p(token | prompt and the tokens before it).

        The prompt is read once. A continuation is a few tokens, at least one. Raises as `generate` does.
        """
        slot = self._begin(prompt)
        slot.user = None
        with self._freeing():
            first = slot.read(prompt[len(slot.tokens) :])
            return [self._log_likelihood(slot, prompt, first, continuation) for continuation in continuations]

    def _log_likelihood(
        self, slot: Slot, prompt: Sequence[int], first: torch.Tensor, continuation: Sequence[int]
    ) -> float:
        length, count = len(prompt), len(continuation)
        assert count > 0, "an empty continuation"
        assert self.context_length is None or length + count - 1 <= self.context_length, f"{length} + {count} tokens"
        logits = first  # [count, vocabulary]
        if count > 1:
            slot.truncate(length)
            unread = [*prompt, *continuation[:-1]][len(slot.tokens) :]
            logits = torch.cat([first, slot.read(unread, keep=count - 1)])
        check_finite(logits.max().item())
        likely = torch.log_softmax(logits.double(), dim=-1)
        return sum(likely[row, token].item() for row, token in enumerate(continuation))

    def forget(self) -> None:
        """Free the memory of everything that was read; the next prompt is read from its start."""
        self._pool.drop()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _begin(self, prompt: Sequence[int]) -> Slot:
        """A slot that holds as much of the prompt's beginning as is known already."""
        assert len(prompt) > 0, "an empty prompt"
        limit = self.context_length
        assert limit is None or len(prompt) <= limit, f"a prompt of {len(prompt)} tokens in a context of {limit}"
        return self._pool.take(prompt)

    @contextlib.contextmanager
    def _freeing(self) -> Iterator[None]:
        """Where there is no memory, free what is kept before saying so: a shorter text then finds some."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # The frames that the error passed through hold keys and values too.
            traceback.clear_frames(error.__traceback__)
            self.forget()
            raise OutOfMemory(
                "out of memory: this turn was undone; try a shorter text, a smaller --max-tokens, or -g and -r",
                typed="out of memory: this turn was undone; /reset for a shorter conversation, /set max_tokens for a "
                "shorter reply, or start with -g and -r",
            ) from error


def most_tokens(prompt: int, max_tokens: int, context_length: int | None) -> int:
    """Return how many tokens a reply to a prompt of so many can have; the last of them need not be read."""
    return max_tokens if context_length is None else min(max_tokens, context_length - prompt + 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left; on the CPU, torch says so in the message alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
