"""A run as it is planned: a model, its layout, and how a step goes through it. Nothing of it exists yet."""

from dataclasses import dataclass

from openchatkit.distributed.layout import stage_numbers
from openchatkit.loading.hardware import DTYPES
from openchatkit.models.config import ModelConfig
from openchatkit.models.shards import EMBED, HEAD, layer_name
from openchatkit.training.schedules import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A model and how it would be trained. `layers` are each stage's first and last (exclusive) layers.

    `micro_batches` go through a pipeline at a time, and a step takes `accumulate` times as many. `selective` is of what
    is computed again (see `models.recompute`). `moments` is what the optimizer's are kept in. `sequence_parallel`:
    between layers, a rank of a tensor group has its share of the tokens. `offload`: masters and moments are in main
    memory; `activation_offload`: inputs of layers that are computed again. `documents`: attention is confined to them,
    on a CPU by masks. `on_gpu`: autocast widens the input of norms on a GPU, which then is kept in float32.
    """

    config: ModelConfig
    layers: tuple[tuple[int, int], ...]
    pipeline_size: int = 1
    replicas: int = 1
    tensor_size: int = 1
    schedule: str = "gpipe"
    micro_batches: int = 1
    micro_batch_size: int = 1
    accumulate: int = 1
    seq_length: int = 2048
    precision: str = "bfloat16"
    recompute: bool = True
    selective: bool = False
    dp_mode: str = "allreduce"
    moments: str = "float32"
    sequence_parallel: bool = False
    offload: bool = False
    activation_offload: bool = False
    documents: bool = False
    on_gpu: bool = True

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline_size * self.replicas * self.tensor_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all replicas."""
        return self.tokens * self.micro_batches * self.accumulate * self.replicas

    @property
    def stages_a_rank(self) -> int:
        """Number of stages on each rank."""
        return len(self.layers) // self.pipeline_size

    @property
    def width(self) -> int:
        """Bytes of a number of the hidden states."""
        return DTYPES[self.precision].itemsize

    @property
    def whole_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states, of all tokens: of a sum over parts."""
        return self.tokens * self.config.hidden_size * self.width

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states that a rank has of a micro-batch between layers: of a message between stages."""
        return self.whole_bytes // (self.tensor_size if self.sequence_parallel else 1)

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """Return the numbers of a rank's stages."""
        return stage_numbers(
            pipeline_rank,
            pipeline_size=self.pipeline_size,
            stages_a_rank=self.stages_a_rank,
            v_shaped=SCHEDULES[self.schedule].v_shaped,
        )

    def shards_of(self, stage: int) -> list[str]:
        """Return the shards of a stage."""
        first, last = self.layers[stage]
        embed, head = stage == 0, stage == len(self.layers) - 1
        return [EMBED] * embed + [layer_name(number) for number in range(first, last)] + [HEAD] * head
