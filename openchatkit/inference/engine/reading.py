"""Tokens through a model into a cache, and what the caches hold.

Owns the forward pass, and the rule that a slot's list of tokens is the truth: whatever is raised in the middle of a
pass, Ctrl-C included, what the list says is in the cache and in front, and the rest is overwritten or gone.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from openchatkit.inference.engine.cache import new_cache
from openchatkit.libraries import hf_transformers

# A longer text is read in parts of this many tokens: memory stays bounded, and giving up need not wait for all of it.
CHUNK = 512
# A model with recurrent states reads up to so many tokens one by one after what it has read; more, from the start.
FEW = 32


class Reader:
    """Runs a model over tokens, with a growing cache where the model allows it, else with transformers' own."""

    # Where only some lengths of drafts are fast, the one to use.
    draft_length: int | None = None

    def __init__(
        self, model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype | None = None, limit: int | None
    ) -> None:
        self._model = model
        self._device = device
        self._dtype = dtype
        self._limit = limit
        # The logits but the last are not needed, and at 50,000 words of vocabulary they are large.
        self._narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache_argument = hf_transformers.cache_argument(model)
        assert self._cache_argument is not None, f"{type(model).__name__} keeps no keys and values"
        self.recurrent = hf_transformers.has_recurrent_states(model.config)
        self.croppable = not isinstance(self.new_cache(), DynamicCache)

    def new_cache(self) -> Cache:
        return new_cache(self._model.config, dtype=self._dtype, limit=self._limit)

    def truncate(self, cache: Cache, length: int) -> None:
        """Let a croppable cache hold its first `length` tokens alone."""
        cache.truncate(length)

    @torch.inference_mode()
    def read(self, cache: Cache, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        """Append tokens to a cache that holds `held`; the logits behind the last `keep`, float32 [keep, vocabulary]."""
        return self._logits(self._model, cache, tokens, keep)

    def _logits(self, model: object, cache: Cache, tokens: Sequence[int], keep: int) -> torch.Tensor:
        input_ids = torch.tensor([tokens], device=self._device)  # [1, new]
        options = {"logits_to_keep": keep} if self._narrow else {}
        output = model(input_ids=input_ids, use_cache=True, **{self._cache_argument: cache}, **options)
        return output.logits[0, -keep:].float()


class Slot:
    """A cache and the tokens that it holds."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._cache: Cache | None = None
        # Whether something began that may have left the cache with more than the list says.
        self._uncertain = False
        self.tokens: list[int] = []
        self.user: object = None  # whose reply is being read into it

    def shares(self, prompt: Sequence[int]) -> int:
        """How many tokens of `prompt` need not be read; the last one always does, for the logits behind it."""
        pairs = zip(self.tokens, prompt, strict=False)
        same = next((number for number, (held, new) in enumerate(pairs) if held != new), None)
        return min(len(self.tokens) if same is None else same, len(prompt) - 1)

    def slow_to_go_on(self, length: int) -> bool:
        """Whether reading up to `length` tokens is faster from the start."""
        return self._reader.recurrent and length - len(self.tokens) > FEW

    def truncate(self, length: int) -> None:
        """Hold the first `length` tokens alone, or none at all where the cache cannot be cropped."""
        if length == len(self.tokens) and not self._uncertain:
            return
        if not self._reader.croppable:
            self.drop()
            return
        self._uncertain = True
        del self.tokens[length:]
        if self._cache is not None:
            self._reader.truncate(self._cache, length)
        self._uncertain = False

    def read(
        self, tokens: Sequence[int], keep: int = 1, *, cancelled: Callable[[], bool] = lambda: False
    ) -> torch.Tensor | None:
        """Append tokens; the logits behind each of the last `keep`, float32 [keep, vocabulary].

        `cancelled` is asked before each part; once it is true, the parts read so far are kept and None is returned. A
        model with recurrent states reads a text's beginning as a whole, and then one token at a time.
        """
        assert 0 < keep <= len(tokens), f"{keep} logits of {len(tokens)} tokens"
        assert keep == 1 or len(tokens) <= CHUNK, f"{keep} logits of {len(tokens)} tokens, which are read in parts"
        size = CHUNK if not self._reader.recurrent else 1 if self.tokens else len(tokens)
        assert keep == 1 or size > 1, f"{keep} logits of {len(tokens)} tokens, which are read one by one"
        for start in range(0, len(tokens), size):
            if cancelled():
                return None
            logits = self._read(tokens[start : start + size], keep)
        return logits

    def _read(self, tokens: Sequence[int], keep: int) -> torch.Tensor:
        self._uncertain = True
        try:
            if self._cache is None:
                self._cache = self._reader.new_cache()
            logits = self._reader.read(self._cache, tokens, keep, held=len(self.tokens))
        except KeyboardInterrupt:
            raise  # what was held before the pass is whole still
        except BaseException:
            self.drop()
            raise
        self.tokens.extend(tokens)
        self._uncertain = False
        return logits

    def drop(self) -> None:
        """Hold nothing, and free the memory."""
        self._cache, self._uncertain = None, False
        self.tokens.clear()


class Pool:
    """At most `size` slots, so at most `size` texts are held at a time, each as long as the context at most."""

    def __init__(self, reader: Reader, size: int) -> None:
        assert size > 0, f"{size} slots"
        self._slots = [Slot(reader) for _ in range(size)]  # the least recently used first

    def take(self, prompt: Sequence[int]) -> Slot:
        """The slot that serves `prompt` best, holding just what they share.

        That is the one that shares the longest beginning, if it loses at most half of what it holds: texts of different
        users all begin with the same preamble, and none should evict another for it. Else it is the one that was used
        longest ago.
        """
        shared = [slot.shares(prompt) for slot in self._slots]
        best = max(range(len(shared)), key=shared.__getitem__)
        if not shared[best] or 2 * shared[best] < len(self._slots[best].tokens):
            best = 0
        slot = self._slots[best]
        self._slots = [*(other for other in self._slots if other is not slot), slot]
        slot.truncate(slot.shares(prompt))
        if slot.slow_to_go_on(len(prompt)):
            slot.drop()
        return slot

    def drop(self) -> None:
        """Hold nothing, and free the memory."""
        for slot in self._slots:
            slot.drop()
