"""The vocabulary's loss alone, forward and backward, by the size of its chunks, and the product that is its weight's
gradient, alone, by the precision in which it is added up."""

import torch
from torch import nn

from _gpu_check import timing
from _gpu_check.fixtures import VOCABULARY
from _gpu_check.rows import Context, Result
from openchatkit.training import loss as training_loss
from openchatkit.training.precision import autocast


def run(context: Context) -> None:
    """Time the loss and the product."""
    device = torch.device(context.device)
    tokens, vocabulary, width = context.pick((256, 512, 64), (8192, VOCABULARY, 4096))
    own = training_loss.CHUNK_TOKENS
    for chunk in dict.fromkeys(context.pick((own, 64), (own, 1024, 4096, 16384))):
        name = f"chunks of {chunk:,}" + (" (the trainer's)" if chunk == own else "")
        context.check(name, lambda r, chunk=chunk: whole(r, device, tokens, vocabulary, width, chunk))
    rows = min(tokens, own)
    context.check(
        f"weight gradient of {rows:,} tokens, as it is", lambda r: product(r, device, rows, vocabulary, width)
    )
    context.check(
        f"weight gradient of {rows:,} tokens, addmm in float32",
        lambda r: product_in_float32(r, device, rows, vocabulary, width),
        needs_cuda=True,
    )


def whole(result: Result, device: torch.device, tokens: int, vocabulary: int, width: int, chunk: int) -> None:
    """One call of the loss in bfloat16 with its backward: time, and memory beyond the weight and its gradient."""
    projection = nn.Linear(width, vocabulary, bias=False, device=device)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    loss = training_loss.VocabularyLoss(projection, chunk_tokens=chunk)
    found = []

    def both() -> None:
        with autocast(device, torch.bfloat16):
            found.append(loss(hidden, labels, scale=1 / tokens))
        found[-1].backward()
        found[-1] = found[-1].detach()
        hidden.grad = None

    both()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = timing.median_seconds(device, both, repeat=3, warm=1)
    result.values["ms"] = 1e3 * seconds
    # Logits, the hidden states' gradient and the weight's: three products.
    result.values["TFLOP/s"] = 6 * tokens * vocabulary * width / seconds / 1e12
    if device.type == "cuda":
        result.values["GiB beyond"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    logits = hidden.detach() @ projection.weight.detach().T
    wanted = nn.functional.cross_entropy(logits, labels).item()
    off = abs(found[0].item() - wanted) / wanted
    result.values["off by"] = off
    result.require(off <= 1e-3, f"the loss is {found[0].item():.5f}, cross_entropy in float32 says {wanted:.5f}")


def product(result: Result, device: torch.device, rows: int, vocabulary: int, width: int) -> None:
    """p.T @ x in bfloat16, widened and added to a float32 gradient."""
    p, x, gradient = _operands(device, rows, vocabulary, width)
    seconds = timing.median_seconds(device, lambda: gradient.add_(p.T @ x))
    result.values["ms"], result.values["TFLOP/s"] = 1e3 * seconds, 2 * rows * vocabulary * width / seconds / 1e12


def product_in_float32(result: Result, device: torch.device, rows: int, vocabulary: int, width: int) -> None:
    """The same by one addmm whose output is the float32 gradient."""
    p, x, gradient = _operands(device, rows, vocabulary, width)
    torch.addmm(gradient, p.T, x, out_dtype=torch.float32, out=gradient)
    wanted = p.T[:64].float() @ x.float()
    off = ((gradient[:64] - wanted).norm() / wanted.norm()).item()
    result.values["off by"] = off
    seconds = timing.median_seconds(
        device, lambda: torch.addmm(gradient, p.T, x, out_dtype=torch.float32, out=gradient)
    )
    result.values["ms"], result.values["TFLOP/s"] = 1e3 * seconds, 2 * rows * vocabulary * width / seconds / 1e12
    result.require(off <= 1e-3, f"the product is off by {off:.2e}, 1e-3 is allowed")


def _operands(device: torch.device, rows: int, vocabulary: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    p, x = (
        torch.randn(rows, size, device=device, dtype=torch.bfloat16, generator=generator)
        for size in (vocabulary, width)
    )
    return p, x, torch.zeros(vocabulary, width, device=device)
