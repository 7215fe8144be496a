"""The decode loop: prompt token ids in, reply token ids out, one at a time.

Owns the order of prefill, next token and speculation, and what ends a reply by token. Text, stop strings and turns are
not known here. The model is any causal language model of transformers, whose `generate()` is the test oracle, or a
network of the kit's own.

A prompt that begins as an earlier text did, reply included, is read only from where they differ. So undoing,
regenerating and editing need no call, and a turn costs its own tokens.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from transformers import PreTrainedModel

from openchatkit.errors import UserError
from openchatkit.inference.engine.prefix_cache import CHUNK, Cancelled, KVSlot, PrefixCache
from openchatkit.inference.engine.runner import (
    CompiledRunner,
    ModelRunner,
    RecomputingRunner,
    Runner,
    can_compile,
)
from openchatkit.inference.engine.sampling import Sampling, check_finite, choose, mark_seen
from openchatkit.inference.engine.speculation import PromptLookup, Speculation

if TYPE_CHECKING:  # what a chat with a Hugging Face model does without
    from openchatkit.inference.engine.stage_runner import StageRunner
    from openchatkit.models.stage import Stage


class OutOfMemory(UserError):
    """The device has no memory for this reply; the model itself is unharmed."""


@dataclass
class Statistics:
    """Tokens and times of one reply, in seconds of wall clock; `cached_tokens` of the prompt had been read before.

    `accepted_tokens` of the `drafted_tokens` that prompt lookup guessed were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Engine:
    """A loaded model that continues texts. `device` is where its inputs belong.

    Keys and values of what it has read are kept between calls, for up to `slots` different texts, in `cache_dtype`
    (None: the model's). Prompts are read in pieces of `chunk` tokens. `compile` asks for the compiled forward pass of
    `runner`, which keeps one text whatever `slots` says (None: where a GPU runs it and the model allows it).
    `recompute` keeps nothing and reads the whole text for each token. One reply at a time: starting another ends the
    last one.
    """

    def __init__(
        self,
        model: "PreTrainedModel | Stage",
        *,
        eos_ids: Collection[int],
        device: torch.device,
        cache_dtype: torch.dtype | None = None,
        slots: int = 1,
        chunk: int = CHUNK,
        compile: bool | None = None,
        compile_options: dict[str, Any] | None = None,
        recompute: bool = False,
    ) -> None:
        self._model = model
        self._eos_ids = frozenset(eos_ids)
        self._device = device
        limit = self.context_length
        compile = False if recompute else compile
        compilable = compile is not False and isinstance(model, PreTrainedModel) and can_compile(model, limit)
        if compile and not compilable:
            logger.warning("this model cannot be compiled as a whole and runs uncompiled")
        runner: ModelRunner | StageRunner
        if not isinstance(model, PreTrainedModel):
            from openchatkit.inference.engine import stage_runner

            runner = stage_runner.StageRunner(model, device=device, limit=model.config.max_position_embeddings)
        elif limit is not None and compilable and (compile or device.type == "cuda"):
            runner = CompiledRunner(model, device=device, limit=limit, options=compile_options)
            slots = 1  # each static cache would be compiled for from scratch
        else:
            runner = ModelRunner(model, device=device, dtype=cache_dtype, limit=limit)
        self.runner: Runner = RecomputingRunner(runner.read) if recompute else runner
        self.prefix_cache = PrefixCache(self.runner, slots, chunk)

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
    ) -> Generator[int]:
        """Yield at most `sampling.max_tokens` new token ids; end-of-text ends them and is not yielded.

        The context's end ends them too. `generator` is a CPU generator, so that a seed means the same draws on every
        device. `statistics` is filled in as tokens come. `lookup` guesses tokens ahead from the prompt, which pays when
        the reply quotes it; it changes only the speed, apart from the rounding of several tokens computed at once.
        `cancelled` is called before each chunk of a long prompt is read, and ends the reply there; once tokens come,
        the caller closes the iterator instead. Raises OutOfMemory, and UserError when the model's output is not a
        number.
        """
        statistics = statistics or Statistics()
        started = time.perf_counter()
        slot = self._take_slot(prompt)
        owner = slot.owner = object()
        statistics.prompt_tokens, statistics.cached_tokens = len(prompt), len(slot.tokens)
        limit = most_tokens(len(prompt), sampling.max_tokens, self.context_length)
        text = PromptLookup(prompt, length=self.runner.draft_length) if lookup and self.runner.croppable else None
        speculation = Speculation()
        try:
            with self._freeing_memory():
                logits = slot.prefill(prompt, cancelled=cancelled)  # [1 + draft, vocabulary]
        except Cancelled:
            return
        seen = None if sampling.repetition_penalty == 1 else mark_seen(prompt, logits)
        while True:
            with self._freeing_memory():
                token = choose(logits[speculation.accepted], sampling, generator, seen)
            statistics.seconds = time.perf_counter() - started
            statistics.first_token_seconds = statistics.first_token_seconds or statistics.seconds
            if token in self._eos_ids:
                return
            guessed = speculation.accept(token)
            statistics.accepted_tokens += guessed
            statistics.new_tokens += 1
            yield token
            if statistics.new_tokens >= limit:
                return
            if seen is not None:
                seen[token] = True
            if text is not None:
                text.append(token)
            if guessed:
                continue  # the logits after it are there already
            if text is not None:
                text.learn(speculation)
                speculation = text.guess(limit - statistics.new_tokens - 1)
                statistics.drafted_tokens += len(speculation.draft)
            assert slot.owner is owner, "another reply was begun before this one was done"
            # Wrong guesses stand after the right ones.
            slot.truncate(len(prompt) + statistics.new_tokens - 1)
            with self._freeing_memory():
                logits = slot.decode([token, *speculation.draft])

    def log_likelihoods(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """For each continuation, the sum over its tokens of log p(token | prompt and the tokens before it).

        The prompt is read once. A continuation is a few tokens, at least one. Raises as `generate` does.
        """
        slot = self._take_slot(prompt)
        slot.owner = None
        likelihoods = []
        with self._freeing_memory():
            after_prompt = slot.prefill(prompt)
            for continuation in continuations:
                length, count = len(prompt), len(continuation)
                assert count > 0, "an empty continuation"
                limit = self.context_length
                assert limit is None or length + count - 1 <= limit, f"{length} + {count} tokens"
                logits = after_prompt  # [count, vocabulary]
                if count > 1:
                    slot.truncate(length)
                    if len(slot.tokens) < length:  # a cache that cannot be cropped
                        slot.prefill(prompt)
                    logits = torch.cat([after_prompt, slot.decode(continuation[:-1])])
                check_finite(logits.max().item())
                likely = torch.log_softmax(logits.double(), dim=-1)
                likelihoods.append(sum(likely[row, token].item() for row, token in enumerate(continuation)))
        return likelihoods

    def forget(self) -> None:
        """Free the memory of everything that was read; the next prompt is read from its start."""
        self.prefix_cache.drop()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_slot(self, prompt: Sequence[int]) -> KVSlot:
        """The slot that holds as much of the prompt's beginning as is known already."""
        assert len(prompt) > 0, "an empty prompt"
        limit = self.context_length
        assert limit is None or len(prompt) <= limit, f"a prompt of {len(prompt)} tokens in a context of {limit}"
        return self.prefix_cache.take(prompt)

    @contextlib.contextmanager
    def _freeing_memory(self) -> Iterator[None]:
        """Turn a lack of memory into OutOfMemory, after freeing the caches: a shorter text then finds some."""
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
    """Return how many tokens a reply to a prompt of this length can have; the last of them need not be read."""
    return max_tokens if context_length is None else min(max_tokens, context_length - prompt + 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left; on the CPU, torch says so only in the message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    messages = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in messages)
