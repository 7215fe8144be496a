"""The one-token step compiled, over buffers that never move: what a GPU needs to be kept busy.

At one token a pass, a GPU computes faster than Python can launch. torch.compile's "reduce-overhead" records the
launches once (CUDA graphs) and replays them, which asks for the same shapes and addresses each time: transformers'
StaticCache, which holds a whole context from the start. Prompts are read by the plain model into the same buffers.

Not run on a GPU yet: the tests compile for the CPU with backends that keep the code path and leave out the GPU's.
"""

from collections.abc import Sequence

import torch
from loguru import logger
from transformers import Cache, PreTrainedModel, StaticCache

from openchatkit.inference.engine.reading import Reader
from openchatkit.libraries import hf_transformers

# A cache of a longer context than this would take memory by the gigabyte that short chats never use.
LONGEST_CONTEXT = 8192
# All drafts have one length, since each length is a graph of its own.
DRAFT = 7


class StaticReader(Reader):
    """Reads single tokens, and drafts of one length, with the compiled model; anything else with the model as it is.

    `options` are torch.compile's. A failure to compile is noted in the log, and the model then runs as it is.
    """

    draft_length = DRAFT

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        limit: int,
        options: dict[str, object] | None = None,
    ) -> None:
        super().__init__(model, device=device, limit=limit)
        # Were the shapes allowed to be dynamic, the second one would make a graph that cannot be recorded.
        options = {"mode": "reduce-overhead"} if options is None else options
        self._compiled = torch.compile(
            model, dynamic=False, fullgraph=hf_transformers.compiles_as_a_whole(model), **options
        )

    def new_cache(self) -> Cache:
        return StaticCache(config=self._model.config, max_cache_len=self._limit)

    @torch.no_grad()
    def truncate(self, cache: Cache, length: int) -> None:
        """Let the cache hold its first `length` tokens alone; the buffers stay where they are."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    # Not inference_mode: its tensors and those of a compiled graph may not be mixed.
    @torch.no_grad()
    def read(self, cache: Cache, tokens: Sequence[int], keep: int, *, held: int) -> torch.Tensor:
        """As `Reader.read`."""
        # The first tokens go through the plain model, which makes the buffers.
        if self._compiled is None or not cache.is_initialized or len(tokens) not in (1, 1 + DRAFT):
            return self._logits(self._model, cache, tokens, keep)
        try:
            # A recorded graph writes its output to the same place at every pass.
            return self._logits(self._compiled, cache, tokens, keep).clone()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise errors of their own and those of the tools that they call
            reason = " ".join(str(error).split())[:200]
            logger.warning(f"the model cannot be compiled here and runs uncompiled: {type(error).__name__}: {reason}")
        self._compiled = None
        self.truncate(cache, held)
        return self._logits(self._model, cache, tokens, keep)


def suits(model: PreTrainedModel, limit: int | None) -> bool:
    """Whether a model can be compiled over a static cache: as a whole, on one device, attending to all tokens."""
    devices = hf_transformers.devices(model)
    return (
        limit is not None
        and limit <= LONGEST_CONTEXT
        and len(devices) <= 1
        and "disk" not in devices
        and hf_transformers.compiles_as_a_whole(model)
        and hf_transformers.plain_cache_layers(model.config) is not None
    )
