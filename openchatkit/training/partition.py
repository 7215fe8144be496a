"""Which layers each stage has, and whether a model fits the flags that describe it."""

import itertools
import math

from openchatkit.errors import UserError
from openchatkit.models.config import ModelConfig


def stage_layers(num_layers: int, *, stages: int, layers_per_stage: int) -> list[tuple[int, int]]:
    """The first and the last (exclusive) layer of each stage; every stage but the last has `layers_per_stage`.

    0 spreads the layers evenly. UserError when the stages cannot hold all layers or one would be left without any.
    """
    if not layers_per_stage:
        if num_layers < stages:
            raise UserError(f"--pipeline-group-size {stages}: the model has only {num_layers} layers")
        borders = [round(i * num_layers / stages) for i in range(stages + 1)]
        return list(itertools.pairwise(borders))
    enough = math.ceil(num_layers / stages)
    if layers_per_stage * stages < num_layers:
        raise UserError(
            f"--num-layers {layers_per_stage} x --pipeline-group-size {stages} = {layers_per_stage * stages} layers, "
            f"the model has {num_layers}: give --num-layers {enough}"
        )
    if layers_per_stage * (stages - 1) >= num_layers:
        raise UserError(
            f"--num-layers {layers_per_stage} leaves the last of {stages} stages without a layer, "
            f"the model has {num_layers}: give --num-layers {enough} or fewer stages"
        )
    return [(i * layers_per_stage, min((i + 1) * layers_per_stage, num_layers)) for i in range(stages)]


def check_model(
    config: ModelConfig, *, family: str | None, embedding_dim: int | None, seq_length: int, vocabulary: int
) -> None:
    """Raise UserError where the flags or the tokenizer do not describe the model."""
    if family and family != config.family:
        raise UserError(f"--model-type: the flag says {family}, the model's config.json {config.family}")
    if embedding_dim and embedding_dim != config.hidden_size:
        raise UserError(f"--embedding-dim {embedding_dim}: the model's hidden size is {config.hidden_size}")
    if seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {seq_length}: the model was made for at most {config.max_position_embeddings} tokens"
        )
    if vocabulary > config.vocab_size:
        raise UserError(
            f"--tokenizer-name: the tokenizer has {vocabulary} tokens, the model's embedding {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
