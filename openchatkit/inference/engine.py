"""The decode loop: prompt token ids in, reply token ids out, one at a time.

Owns the key-value cache, the choice of the next token, and what ends a reply by token. Text, stop strings and turns
are not known here. The model is any causal language model of transformers; its `generate()` is the test oracle.
"""

import contextlib
import inspect
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from openchatkit.errors import UserError
from openchatkit.inference.sampling import Sampling, choose


class OutOfMemory(UserError):
    """The device has no room for this reply; the model itself is unharmed."""


@dataclass
class Statistics:
    """What one reply took. Times are seconds of wall clock; `cached_tokens` of the prompt had been read before."""

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
    (None: the model's). `compile` asks for the compiled one-token step (None: where it pays).
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
    ) -> None:
        self._model = model
        self._eos_ids = frozenset(eos_ids)
        self._device = device
        # The prompt's logits but the last are not needed, and at 50,000 words of vocabulary they are large.
        narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if narrow else {}

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
    ) -> Iterator[int]:
        """Yield at most `sampling.max_tokens` new token ids; end-of-text ends them and is not yielded.

        `generator` is a CPU generator, so that a seed means the same draws on every device. `statistics` is filled in
        as tokens come. `lookup` guesses tokens ahead from the prompt, which pays when the reply quotes it; it changes
        the speed alone. Raises OutOfMemory, and UserError when the model's output is not a number.
        """
        statistics = statistics or Statistics()
        statistics.prompt_tokens = len(prompt)
        started = time.perf_counter()
        cache, unread = self._begin(prompt)
        for _ in range(sampling.max_tokens):
            with _memory_errors():
                token = choose(self._read(unread, cache), sampling, generator)
            statistics.seconds = time.perf_counter() - started
            statistics.first_token_seconds = statistics.first_token_seconds or statistics.seconds
            if token in self._eos_ids:
                return
            statistics.new_tokens += 1
            yield token
            unread = [token]

    def log_likelihoods(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """For each continuation, the sum over its tokens of log p(token | prompt and the tokens before it)."""
        sums = []
        for continuation in continuations:
            cache = DynamicCache(config=self._model.config)
            logits, total = self._read(prompt, cache), 0.0
            for number, token in enumerate(continuation):
                total += torch.log_softmax(logits, dim=-1)[token].item()
                if number + 1 < len(continuation):
                    logits = self._read([token], cache)
            sums.append(total)
        return sums

    def forget(self) -> None:
        """Free the memory of everything that was read; the next prompt is read from its start."""

    def _begin(self, prompt: Sequence[int]) -> tuple[DynamicCache, Sequence[int]]:
        """A cache, and the part of the prompt that it does not hold: all of it, since each reply starts afresh."""
        assert len(prompt) > 0, "an empty prompt"
        return DynamicCache(config=self._model.config), prompt

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Append tokens to the cache; the logits behind the last, float32 [vocabulary]."""
        input_ids = torch.tensor([tokens], device=self._device)  # [1, new]
        output = self._model(input_ids=input_ids, past_key_values=cache, use_cache=True, **self._options)
        return output.logits[0, -1].float()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "out of memory: this turn was undone; /reset for a shorter conversation, or start with a smaller "
            "--max-tokens, or with -g and -r"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left; on the CPU, torch says so in the message alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
