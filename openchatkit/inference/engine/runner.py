"""The forward pass of a model over new tokens of one text: plain, compiled, or without a cache.

Owns how a model is called, transformers' or one of the kit's own, and which kind of KV cache suits it. At one token a
pass, a GPU computes faster than Python can launch. torch.compile's "reduce-overhead" records the launches once (CUDA
graphs) and replays them, which needs the same shapes and addresses each time: transformers' StaticCache, which holds a
whole context from the start. Prompts are read by the plain model into the same buffers.

Not run on a GPU yet: the tests compile for the CPU with backends that keep the code path and leave out the GPU's.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from loguru import logger
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from openchatkit.inference.engine.kv_cache import new_cache
from openchatkit.libraries import hf_transformers

# A static cache for a longer context would take gigabytes that short chats never use.
_MAX_STATIC_CONTEXT = 8192
# Compiled drafts all have this length, since each length needs a graph of its own.
_STATIC_DRAFT = 7


class Runner(Protocol):
    """A way to run a model over the tokens of a text. What was read is in a cache, into which only the runner looks.

    `draft_length` is the one length of drafts that is fast, where there is one. A `recurrent` model keeps a state that
    several tokens at once can only begin; a cache that is not `croppable` cannot lose tokens.
    """

    draft_length: int | None
    recurrent: bool
    croppable: bool

    def new_cache(self) -> Any:
        """An empty cache for one text."""

    def truncate(self, cache: Any, length: int) -> None:
        """Let a croppable cache hold only its first `length` tokens."""

    def forward(self, cache: Any, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        """Append tokens to a cache that holds `held`; logits after the last `keep` of them, [keep, vocabulary]."""


class ModelRunner:
    """Runs a model of transformers, with a growing cache where the model allows it, else with transformers' own.

    `dtype` is that of the cache (None: the model's), `limit` the most tokens that a text can have.
    """

    draft_length: int | None = None

    def __init__(
        self, model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype | None = None, limit: int | None
    ) -> None:
        self._model = model
        self._device = device
        self._dtype = dtype
        self._limit = limit
        # Only the last logits are needed, and at 50,000 words of vocabulary they are large.
        self._narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
        argument = hf_transformers.cache_argument(model)
        assert argument is not None, f"{type(model).__name__} keeps no keys and values"
        self._cache_argument = argument
        self.recurrent = hf_transformers.has_recurrent_states(model.config)
        self.croppable = not isinstance(self.new_cache(), DynamicCache)

    def new_cache(self) -> Cache:
        return new_cache(self._model.config, dtype=self._dtype, limit=self._limit)

    def truncate(self, cache: Any, length: int) -> None:
        cache.truncate(length)

    @torch.inference_mode()
    def forward(self, cache: Any, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        return self._model(**self._inputs(tokens, keep, cache)).logits[0, -keep:].float()

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], keep: int) -> torch.Tensor:
        """Read a text from its start, without a cache; logits after the last `keep` of its tokens."""
        return self._model(**self._inputs(tokens, keep)).logits[0, -keep:].float()

    def _inputs(self, tokens: Sequence[int], keep: int, cache: Cache | None = None) -> dict[str, Any]:
        inputs = {"input_ids": torch.tensor([tokens], device=self._device), self._cache_argument: cache}  # [1, new]
        return {**inputs, "use_cache": cache is not None, **({"logits_to_keep": keep} if self._narrow else {})}


class CompiledRunner(ModelRunner):
    """Runs single tokens, and drafts of one length, through the compiled model, and anything else through the plain.

    `options` are torch.compile's. A failure to compile is logged, and the model then runs uncompiled.
    """

    draft_length = _STATIC_DRAFT

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        limit: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._static_length = limit
        super().__init__(model, device=device, limit=limit)
        # With dynamic shapes, the second shape would make a graph that cannot be recorded.
        options = {"mode": "reduce-overhead"} if options is None else options
        self._compiled: Callable[..., Any] | None = torch.compile(
            model, dynamic=False, fullgraph=hf_transformers.compiles_as_a_whole(model), **options
        )

    def new_cache(self) -> Cache:
        return StaticCache(config=self._model.config, max_cache_len=self._static_length)

    @torch.no_grad()
    def truncate(self, cache: Any, length: int) -> None:
        """Let the cache hold only its first `length` tokens; the buffers stay where they are."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    # Not inference_mode: its tensors and those of a compiled graph may not be mixed.
    @torch.no_grad()
    def forward(self, cache: Any, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        inputs = self._inputs(tokens, keep, cache)
        # The first tokens go through the plain model, which makes the buffers.
        if self._compiled is not None and cache.is_initialized and len(tokens) in (1, 1 + _STATIC_DRAFT):
            try:
                # A recorded graph writes its output to the same place at every pass.
                return self._compiled(**inputs).logits[0, -keep:].float().clone()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise errors of their own and those of the tools that they call
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                logger.warning(f"the model cannot be compiled here and runs uncompiled: {reason}")
            self._compiled = None
            self.truncate(cache, held)
        return self._model(**inputs).logits[0, -keep:].float()


class RecomputingRunner:
    """Reads the whole text for each token: slow, and of use to prove what a cache gives. Its caches are the tokens.

    `read` is that of the model's other runner.
    """

    draft_length: int | None = None
    recurrent, croppable = False, True

    def __init__(self, read: Callable[[Sequence[int], int], torch.Tensor]) -> None:
        self._read = read

    def new_cache(self) -> list[int]:
        return []

    def truncate(self, cache: Any, length: int) -> None:
        del cache[length:]

    def forward(self, cache: Any, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        cache[held:] = tokens
        return self._read(cache, keep)


def can_compile(model: PreTrainedModel, limit: int | None) -> bool:
    """Whether a model can be compiled over a static cache: as a whole, on one device, attending to all tokens."""
    devices = hf_transformers.devices(model)
    return (
        limit is not None
        and limit <= _MAX_STATIC_CONTEXT
        and len(devices) <= 1
        and "disk" not in devices
        and hf_transformers.compiles_as_a_whole(model)
        and hf_transformers.plain_cache_layers(model.config) is not None
    )
