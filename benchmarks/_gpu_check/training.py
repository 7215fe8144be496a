"""Training speed of the trainer's own step on random weights and tokens, by model and variant.

MFU = tokens/s x (6 N + 6 L H T) / rate, for N numbers of matrices that a token is multiplied with (the output layer
included, the embedding not), L layers of width H and rows of T tokens, causal: half of the square. What is recomputed
does not count. The rate is the card's published one and the measured one.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from _gpu_check import fixtures, timing
from _gpu_check.rows import Context, Result, Skip
from openchatkit.errors import UserError
from openchatkit.models.config import ModelConfig
from openchatkit.training.step import Trainer

WARM_STEPS, STEPS = 3, 5
# Bytes that activations take for each token, layer and number of the width where they are kept, and where only the
# layer's input is; to leave out what cannot fit, and no more exact than that.
KEPT, INPUT = 48, 2


@dataclass(frozen=True)
class Variant:
    """Settings of one measurement. Compiled layers stay compiled, so those variants come last."""

    name: str
    recompute: bool
    cudnn: bool = False
    compiled: bool = False


VARIANTS = (
    Variant("recomputed", recompute=True),
    Variant("kept", recompute=False),
    Variant("kept, cuDNN", recompute=False, cudnn=True),
    Variant("kept, compiled", recompute=False, compiled=True),
    Variant("recomputed, compiled", recompute=True, compiled=True),
    Variant("kept, compiled, cuDNN", recompute=False, cudnn=True, compiled=True),
)


@dataclass(frozen=True)
class Model:
    """A model to train: how many rows at once, and with which optimizer."""

    name: str
    config: ModelConfig
    rows: int
    length: int
    optimizer: str = "adamw"


def run(context: Context) -> None:
    """Train each model in each variant for a few steps."""
    device = torch.device(context.device)
    rate, _ = timing.rates(context, device)
    for model in models(context):
        trainer: list[Trainer] = []  # made by the first check that needs it, so that a failure is that check's

        def make(model: Model = model, trainer: list[Trainer] = trainer) -> Trainer:
            if not trainer:
                trainer.append(build(model, device))
            return trainer[0]

        for variant in VARIANTS:
            context.check(
                f"{model.name}, {variant.name}",
                lambda r, m=model, v=variant, make=make: measure(r, context, m, v, make, rate),
                needs_cuda=variant.cudnn,
                needs_seconds=context.pick(1, 20 if variant.compiled else 8),
            )
        trainer.clear()
        del make
        torch.compiler.reset()
        gc.collect()
        if context.cuda:
            torch.cuda.empty_cache()


def models(context: Context) -> Iterator[Model]:
    """The models of a size; of 6.9B, the whole where it fits with 8-bit Adam, else half of its layers."""
    if context.size == "toy":
        config = fixtures.neox(layers=2, width=64, heads=4, length=64, vocabulary=512)
        yield Model("2 x 64", config, rows=2, length=64)
        return
    length = 2048
    for shape in ("1b", "2.8b", "6.9b"):
        layers, width, heads, rows = fixtures.SHAPES[shape]
        name, optimizer = f"{shape}, {rows} x {length}", "adamw"
        if shape == "6.9b":
            memory = torch.cuda.get_device_properties(0).total_memory if context.cuda else 0
            if memory > 120 * 2**30:
                name, optimizer = f"{name}, 8-bit Adam", "8bit-adam"
            else:
                layers //= 2
                name = f"half of {name}"
        config = fixtures.neox(layers=layers, width=width, heads=heads, length=length)
        yield Model(name, config, rows, length, optimizer)


def build(model: Model, device: torch.device) -> Trainer:
    """The trainer of a model, in bfloat16."""
    stage = fixtures.make_stage(model.config, device, recompute=True, quick=True)
    try:
        return fixtures.make_trainer(
            stage, dtype=torch.bfloat16, rows=model.rows, length=model.length, optimizer=model.optimizer
        )
    except UserError as error:  # bitsandbytes is missing
        raise Skip(str(error)) from error


def measure(
    result: Result, context: Context, model: Model, variant: Variant, make: Callable[[], Trainer], rate: float
) -> None:
    """The steps of one variant."""
    device = torch.device(context.device)
    if context.cuda:
        needed = bytes_needed(model, variant)
        total = torch.cuda.get_device_properties(device).total_memory
        if needed > total:
            raise Skip(f"needs about {needed / 2**30:.0f} GiB of {total / 2**30:.0f}")
    trainer = make()
    [stage] = trainer.stages
    stage.recompute = variant.recompute
    if variant.compiled:
        if variant.cudnn:
            # The choice of attention is part of a compiled graph, and changing it does not make torch compile again.
            torch.compiler.reset()
        for layer in fixtures.layers_of(stage):
            # On the CPU the tracing is what can be checked; its code generator needs a C++ compiler and minutes.
            layer.compile(fullgraph=True, **({} if context.cuda else {"backend": "aot_eager"}))
    if context.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    data = fixtures.Tokens(model.length, model.config.vocab_size)
    kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if variant.cudnn else contextlib.nullcontext()
    times = []
    try:
        with kernel:
            for number in range(WARM_STEPS + STEPS):
                timing.synchronise(device)
                started = time.perf_counter()
                step = trainer.step(number, data)
                timing.synchronise(device)
                times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError as error:
        trainer.weights.drop_gradients()
        if variant.recompute:
            raise
        raise Skip("out of memory: the activations do not fit") from error
    report(result, context, model, trainer, times, rate)
    result.require(step.applied, "the last step's gradient was not finite")


def report(result: Result, context: Context, model: Model, trainer: Trainer, times: list[float], rate: float) -> None:
    """Tokens a second and what share of the rates that is; the peak of reserved memory."""
    device = torch.device(context.device)
    seconds = sorted(times[WARM_STEPS:])[STEPS // 2]
    speed = trainer.global_batch * model.length / seconds
    flops = flops_per_token(model, fixtures.matrix_parameters(next(iter(trainer.stages))))
    published = timing.published_rate(device)
    result.values["tokens/s"] = speed
    if published:
        result.values["MFU, published rate"] = speed * flops / published
    result.values["MFU, measured rate"] = speed * flops / rate
    if context.cuda:
        result.values["GiB reserved"] = torch.cuda.max_memory_reserved() / 2**30
    result.values["ms a step"] = 1e3 * seconds
    result.values["s of the first step"] = times[0]


def flops_per_token(model: Model, matrices: int) -> float:
    """6 N + 6 L H T: see the module's docstring."""
    return 6 * matrices + 6 * model.config.num_layers * model.config.hidden_size * model.length


def bytes_needed(model: Model, variant: Variant) -> float:
    """A rough count: weights, gradients, optimizer state, the casts of weights, and activations."""
    config = model.config
    parameters = 12 * config.num_layers * config.hidden_size**2 + 2 * config.vocab_size * config.hidden_size
    each = (16 if model.optimizer == "adamw" else 10) + 2
    kept = KEPT * (1 if variant.recompute else config.num_layers) + (INPUT * config.num_layers)
    return parameters * each + kept * model.rows * model.length * config.hidden_size
