"""Texts that the model has read, kept so that a prompt is read only from where it differs from one of them.

Owns the rule that a slot's list of tokens is the truth: whatever is raised in the middle of a forward pass, Ctrl-C
included, the cache begins with exactly those tokens, and anything after them is overwritten or gone.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from openchatkit.inference.engine.runner import Runner

# A longer prompt is read in chunks of this many tokens: memory stays bounded, and cancelling need not wait for all.
CHUNK = 512
# A model with recurrent states reads up to this many new tokens one by one; it reads more from the text's start.
MAX_SINGLE_STEPS = 32


class Cancelled(Exception):
    """The reading of a prompt was cancelled."""


class KVSlot:
    """One text's KV cache, and the tokens that it holds."""

    def __init__(self, runner: Runner, chunk: int) -> None:
        self._runner = runner
        self._chunk = chunk
        self._cache: Any = None  # the runner's
        # Whether a pass or a truncation began that may have left the cache with more than the list says.
        self._uncertain = False
        self.tokens: list[int] = []
        self.owner: object = None  # the reply that is being generated from this slot

    def shared_length(self, prompt: Sequence[int]) -> int:
        """Number of leading tokens of `prompt` that are held; never the last one, which is read for its logits."""
        pairs = zip(self.tokens, prompt, strict=False)
        same = next((number for number, (held, new) in enumerate(pairs) if held != new), None)
        return min(len(self.tokens) if same is None else same, len(prompt) - 1)

    def keep_shared(self, prompt: Sequence[int]) -> None:
        """Hold only what `prompt` shares, or nothing where reading it from the start is faster."""
        self.truncate(self.shared_length(prompt))
        if self._runner.recurrent and len(prompt) - len(self.tokens) > MAX_SINGLE_STEPS:
            self.drop()

    def truncate(self, length: int) -> None:
        """Hold only the first `length` tokens, or none at all where the cache cannot be cropped."""
        if length == len(self.tokens) and not self._uncertain:
            return
        if not self._runner.croppable:
            self.drop()
            return
        self._uncertain = True
        del self.tokens[length:]
        if self._cache is not None:
            self._runner.truncate(self._cache, length)
        self._uncertain = False

    def prefill(self, prompt: Sequence[int], *, cancelled: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """Read the part of `prompt` that is not held; the logits after its last token, float32 [1, vocabulary].

        `cancelled` is called before each chunk. Once it is true, Cancelled is raised, and the chunks read are kept.
        """
        size = self._chunk if not self._runner.recurrent else 1 if self.tokens else len(prompt)
        assert len(self.tokens) < len(prompt), f"a prompt of {len(prompt)} tokens, all of them held"
        for start in range(len(self.tokens), len(prompt), size):
            if cancelled():
                raise Cancelled
            chunk = prompt[start : start + size]
            with self._appending(chunk) as cache:
                logits = self._runner.forward(cache, chunk, 1, held=start)
        return logits

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens; the logits after each, float32 [tokens, vocabulary].

        They take one pass, or one each where the model has recurrent states.
        """
        logits = []
        for part in [[token] for token in tokens] if self._runner.recurrent else [tokens]:
            with self._appending(part) as cache:
                logits.append(self._runner.forward(cache, part, len(part), held=len(self.tokens)))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @contextlib.contextmanager
    def _appending(self, tokens: Sequence[int]) -> Iterator[Any]:
        """The cache, for a pass that appends tokens to it; they are held once the pass succeeds."""
        self._uncertain = True
        try:
            if self._cache is None:
                self._cache = self._runner.new_cache()
            yield self._cache
        except KeyboardInterrupt:
            raise  # the tokens held before the pass are intact
        except BaseException:
            self.drop()
            raise
        self.tokens.extend(tokens)
        self._uncertain = False

    def drop(self) -> None:
        """Hold nothing, and free the memory."""
        self._cache, self._uncertain = None, False
        self.tokens.clear()


class PrefixCache:
    """The last texts read, one for each of `size` slots."""

    def __init__(self, runner: Runner, size: int, chunk: int) -> None:
        assert size > 0, f"{size} slots"
        self.slots = [KVSlot(runner, chunk) for _ in range(size)]  # the least recently used first

    def take(self, prompt: Sequence[int]) -> KVSlot:
        """The best slot for `prompt`, holding only what they share.

        That is the one that shares the longest prefix, if it loses at most half of what it holds: texts of different
        users all begin with the same preamble, and none should evict another for it. Else it is the one that was used
        longest ago.
        """
        shared = [slot.shared_length(prompt) for slot in self.slots]
        best = max(range(len(shared)), key=shared.__getitem__)
        if not shared[best] or 2 * shared[best] < len(self.slots[best].tokens):
            best = 0
        slot = self.slots[best]
        # Replaced in one go, so that an interrupt loses no slot.
        self.slots = [*self.slots[:best], *self.slots[best + 1 :], slot]
        slot.keep_shared(prompt)
        return slot

    def drop(self) -> None:
        """Hold nothing, and free the memory."""
        for slot in self.slots:
            slot.drop()
