"""The trainer's step on this device against the same step on the CPU in float64, and against itself.

Owns the tolerances. The reference is one for all devices, so that a run on the CPU compares two precisions and can fail
as one on a GPU can. Gradients are compared tensor by tensor: float32 by the largest difference as a share of the
tensor's largest entry, the half precisions by the norm of the difference as a share of the tensor's norm.
"""

import functools
import math

import torch
from torch import Tensor

from _gpu_check import fixtures
from _gpu_check.rows import Context, Result
from openchatkit.models.config import ModelConfig

SIZES = {"layers": 3, "width": 128, "heads": 4, "length": 128, "vocabulary": 1000}
MODELS = {
    "neox, parallel": lambda: fixtures.neox(**SIZES),
    "neox, serial": lambda: fixtures.neox(**SIZES, use_parallel_residual=False),
    "neox, tied": lambda: fixtures.neox(**SIZES, tie_word_embeddings=True),
    "gptj": lambda: fixtures.gptj(**SIZES),
}
PACKINGS = {"plain": False, "documents": True}
CPU = torch.device("cpu")
ROWS, MICRO_BATCHES = 4, 2
# How far gradients and losses may be from the reference; the loss's is relative.
GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}
LOSSES = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}
# The same for the losses of 20 steps of AdamW, in which differences grow.
LEARNING = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FP16_SCALE = 1024.0


def run(context: Context) -> None:
    """Compare one step of each model, 20 steps of two, and a step with itself."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    device = torch.device(context.device)
    for model in MODELS:
        for packing in PACKINGS:
            reference = Reference(model, packing)
            for recompute in (False, True):
                name = f"one step, {model}, {packing}{', recomputed' if recompute else ''}"
                context.check(name, lambda r, of=reference, re=recompute: one_step(r, device, of, recompute=re))
    for model in ("neox, parallel", "gptj"):
        context.check(f"20 steps, {model}", lambda result, model=model: learning(result, device, model))
    # On a GPU this is known to depend on the attention's kernel: there it is measured and not required.
    required = not context.cuda
    for packing, documents in PACKINGS.items():
        context.check(
            f"a step twice, {packing}", lambda r, d=documents: twice(r, context, documents=d, required=required)
        )


class Reference:
    """The step of a model on the CPU in float64, taken when it is first asked for."""

    def __init__(self, model: str, packing: str) -> None:
        self.config, self.documents = MODELS[model](), PACKINGS[packing]

    @functools.cached_property
    def found(self) -> tuple[float, list[Tensor]]:
        """Its loss and gradients."""
        return step(self.config, CPU, torch.float64, documents=self.documents, recompute=False)


def one_step(result: Result, device: torch.device, reference: Reference, *, recompute: bool) -> None:
    """Compare loss and gradients of one step in each precision."""
    wanted_loss, wanted = reference.found
    failures = []
    for dtype, name in NAMES.items():
        loss, gradients = step(reference.config, device, dtype, documents=reference.documents, recompute=recompute)
        error = worst(gradients, wanted, by_norm=dtype != torch.float32)
        off = abs(loss - wanted_loss) / wanted_loss
        result.values[name], result.values[f"{name} loss"] = error, off
        if not error <= GRADIENTS[dtype]:
            failures.append(f"{name}: a gradient is off by {error:.2e}, {GRADIENTS[dtype]:.0e} is allowed")
        if not off <= LOSSES[dtype]:
            failures.append(f"{name}: the loss is off by {off:.2e}, {LOSSES[dtype]:.0e} is allowed")
    result.require(not failures, "; ".join(failures))


def step(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, *, documents: bool, recompute: bool
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a step; float64 makes the parameters float64, other types leave them float32."""
    stage = fixtures.make_stage(config, device, recompute=recompute)
    if dtype == torch.float64:
        stage.double()
    trainer = fixtures.make_trainer(
        stage,
        dtype=torch.float32 if dtype == torch.float64 else dtype,  # float32: no autocast
        rows=ROWS,
        length=SIZES["length"],
        micro_batches=MICRO_BATCHES,
        optimizer=fixtures.GradientKeeper,
        clip=0.0,
        scale=FP16_SCALE if dtype == torch.float16 else 1.0,
    )
    loss = trainer.step(0, fixtures.Tokens(SIZES["length"], config.vocab_size, documents=documents)).loss
    keeper = trainer.weights.optimizer
    assert isinstance(keeper, fixtures.GradientKeeper)
    return loss, keeper.gradients


def worst(found: list[Tensor], wanted: list[Tensor], *, by_norm: bool) -> float:
    """The largest relative error of a tensor; infinite where there are not as many, or none."""
    if len(found) != len(wanted) or not wanted:
        return math.inf
    errors = []
    for one, other in zip(found, wanted, strict=True):
        size, off = (other.norm(), (one - other).norm()) if by_norm else (other.abs().max(), (one - other).abs().max())
        errors.append((off / size).item() if size > 0 else off.item())
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def learning(result: Result, device: torch.device, model: str) -> None:
    """Losses of 20 steps on the same rows: those of the reference, and falling."""
    config = MODELS[model]()
    wanted = losses(config, CPU, torch.float64)
    failures = []
    result.values["first loss"], result.values["last loss"] = wanted[0], wanted[-1]
    for dtype, allowed in LEARNING.items():
        found = losses(config, device, dtype)
        off = max(abs(one - other) / other for one, other in zip(found, wanted, strict=True))
        result.values[f"{NAMES[dtype]} off by"] = off
        if not off <= allowed:
            failures.append(f"{NAMES[dtype]}: a loss is off by {off:.2e}, {allowed:.0e} is allowed")
        if not found[-1] < 0.9 * found[0]:
            failures.append(f"{NAMES[dtype]}: the loss went from {found[0]:.3f} to {found[-1]:.3f}")
    result.require(not failures, "; ".join(failures))


def losses(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Losses of 20 steps of AdamW on the same rows."""
    stage = fixtures.make_stage(config, device, recompute=False)
    if dtype == torch.float64:
        stage.double()
    trainer = fixtures.make_trainer(
        stage,
        dtype=torch.float32 if dtype == torch.float64 else dtype,
        rows=ROWS,
        length=SIZES["length"],
        micro_batches=MICRO_BATCHES,
        lr=1e-3,
    )
    data = fixtures.Tokens(SIZES["length"], config.vocab_size, repeat=True)
    return [trainer.step(number, data).loss for number in range(20)]


def twice(result: Result, context: Context, *, documents: bool, required: bool) -> None:
    """Three bfloat16 steps from the same weights, twice: how many tensors of weights and optimizer state differ."""
    length = context.pick(128, 1024)  # on a GPU several blocks of queries add to one gradient
    config = fixtures.neox(layers=2, width=256, heads=4, length=length, vocabulary=1000)
    first, second = (_three_steps(config, torch.device(context.device), documents) for _ in range(2))
    assert len(first) == len(second) > 0, (len(first), len(second))
    differing = sum(not torch.equal(one, other) for one, other in zip(first, second, strict=True))
    result.values["tensors"], result.values["tensors that differ"] = len(first), differing
    if required:
        result.require(differing == 0, f"{differing} of {len(first)} tensors differ")


def _three_steps(config: ModelConfig, device: torch.device, documents: bool) -> list[Tensor]:
    stage = fixtures.make_stage(config, device, recompute=True)
    length = config.max_position_embeddings
    trainer = fixtures.make_trainer(stage, dtype=torch.bfloat16, rows=4, length=length, micro_batches=2)
    data = fixtures.Tokens(length, config.vocab_size, documents=documents)
    for number in range(3):
        trainer.step(number, data)
    masters = trainer.weights.masters.values()
    state = [value for master in masters for value in trainer.weights.optimizer.state[master].values()]
    return [tensor.detach().cpu() for tensor in (*masters, *state) if isinstance(tensor, Tensor)]
