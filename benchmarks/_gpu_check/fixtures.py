"""Models, data and trainers for the parts: the trainer's own classes, on random weights and random tokens."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from openchatkit.data.batch import Batch
from openchatkit.distributed.layout import Layout
from openchatkit.models.config import ModelConfig
from openchatkit.models.registry import config_from_hf
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.stage import Stage
from openchatkit.training.learning_rates import LearningRates
from openchatkit.training.local_stages import LocalStages
from openchatkit.training.optimizer import build_optimizer
from openchatkit.training.precision import LossScaler
from openchatkit.training.step import Schedule, Trainer
from openchatkit.training.weights import Weights

# Published shapes: layers, width, heads, and the rows of a micro-batch that suit a card of 80 GB.
SHAPES = {"1b": (16, 2048, 8, 8), "1.4b": (24, 2048, 16, 8), "2.8b": (32, 2560, 32, 4), "6.9b": (32, 4096, 32, 2)}
VOCABULARY = 50304


def neox(*, layers: int, width: int, heads: int, length: int, vocabulary: int = VOCABULARY, **more: Any) -> ModelConfig:
    """A GPT-NeoX of Pythia's proportions."""
    raw = {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": length,
    }
    return config_from_hf(raw | more)


def gptj(*, layers: int, width: int, heads: int, length: int, vocabulary: int) -> ModelConfig:
    """A GPT-J."""
    raw = {"model_type": "gptj", "vocab_size": vocabulary, "n_embd": width, "n_layer": layers, "n_head": heads}
    return config_from_hf(raw | {"n_positions": length, "rotary_dim": width // heads // 2})


class Tokens:
    """Rows of random tokens, with the interface of openchatkit.data.dataset.Dataset.

    `documents` cuts each row in up to four documents that do not see each other. `repeat` gives the same rows at every
    step, which a model can learn by heart.
    """

    def __init__(self, length: int, vocabulary: int, *, documents: bool = False, repeat: bool = False) -> None:
        self.length, self.vocabulary, self.documents, self.repeat = length, vocabulary, documents, repeat
        self.sources = (SimpleNamespace(name="random"),)

    def batch(self, first: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(0 if self.repeat else first)
        tokens = torch.randint(0, self.vocabulary, (count, self.length + 1), generator=generator)
        starts = None
        if self.documents:
            cuts = torch.randint(1, self.length, (count, 3), generator=generator)
            marks = torch.zeros(count, self.length, dtype=torch.int64).scatter_(1, cuts, cuts)
            starts = marks.cummax(dim=1).values
        sources = torch.zeros(count, dtype=torch.int64)
        return Batch(first, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), starts, sources)


def make_stage(config: ModelConfig, device: torch.device, *, recompute: bool, quick: bool = False) -> Stage:
    """A whole model as one stage: the same weights on every device, or with `quick` any, drawn on the device."""
    with torch.device("meta"):
        stage = Stage(config, recompute=recompute)
    stage.to_empty(device=device)
    if not quick:
        stage.init_weights(0)
        if config.tie_embeddings:
            # Drawn by shard, the two would differ; a tied model that is loaded has them equal.
            with torch.no_grad():
                stage.projection.weight.copy_(next(stage.shards[EMBED].parameters()))
        return stage
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, config.init_std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return stage


def make_trainer(
    stage: Stage,
    *,
    dtype: torch.dtype,
    rows: int,
    length: int,
    micro_batches: int = 1,
    optimizer: str | Callable[[Iterable[Tensor]], torch.optim.Optimizer] = "adamw",
    lr: float = 1e-4,
    clip: float = 1.0,
    scale: float = 1.0,
) -> Trainer:
    """A trainer of one rank: `rows` of `length` tokens a step, in micro-batches."""
    weights = Weights(LocalStages({0: stage}), Layout(0, next(stage.parameters()).device), dtype=dtype)
    if isinstance(optimizer, str):
        weights.optimizer = build_optimizer(optimizer, weights, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    else:
        weights.optimizer = optimizer(weights.masters.values())
    return Trainer(
        weights,
        LossScaler(scale, dynamic=False),
        Schedule(rows, 1, LearningRates(lr, 1000), 1000, clip),
        dtype=dtype,
        pp_mode="gpipe",
        micro_batch_size=rows // micro_batches,
        seq_length=length,
    )


class GradientKeeper(torch.optim.Optimizer):
    """Changes nothing and keeps the gradients of a step, as float64 on the CPU, in the order of the parameters."""

    def __init__(self, masters: Iterable[Tensor]) -> None:
        super().__init__(masters, {"lr": 0.0})
        self.gradients: list[Tensor] = []

    def step(self, closure: None = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.gradients = [parameter.grad.detach().double().cpu() for parameter in parameters]


def matrix_parameters(stage: Stage) -> int:
    """Numbers of the weights that a token is multiplied with: all matrices but the embedding, which is looked up."""
    return sum(
        p.numel() for name, shard in stage.named_shards() if name != EMBED for p in shard.parameters() if p.dim() > 1
    )


def layers_of(stage: Stage) -> list[torch.nn.Module]:
    """The layers between embedding and head."""
    return [shard for name, shard in stage.named_shards() if name not in (EMBED, HEAD)]
