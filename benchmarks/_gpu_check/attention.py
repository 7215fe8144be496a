"""Attention alone, forward and backward: causal by each of torch's kernels, and within documents by mask or borders."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from _gpu_check import fixtures, timing
from _gpu_check.rows import Context, Result, Skip
from openchatkit.libraries import pytorch
from openchatkit.models.documents import document_mask, find_borders
from openchatkit.models.layers import causal_attention

# Rows, heads, length and width of a head.
FULL = ((4, 32, 2048, 128), (8, 8, 2048, 256))
TOY = ((2, 2, 64, 16), (1, 2, 64, 32))
# How far outputs of bfloat16 kernels may be apart, as a share of the norm.
ALLOWED = 2e-2
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(context: Context) -> None:
    """Time every kernel at both shapes."""
    for rows, heads, length, width in context.pick(TOY, FULL):
        shape = f"{rows} x {heads} x {length} x {width}"
        case = Case(torch.device(context.device), rows, heads, length, width)
        for name, attend, documents, needs_cuda in case.contestants():
            context.check(
                f"{shape}, {name}", lambda r, c=case, a=attend, d=documents: c.measure(r, a, d), needs_cuda=needs_cuda
            )


class Case:
    """Queries, keys and values of one shape, [rows, heads, length, width], and documents to confine them to."""

    def __init__(self, device: torch.device, rows: int, heads: int, length: int, width: int) -> None:
        self.device, self.shape = device, (rows, heads, length, width)
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = [
            torch.randn(self.shape, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_()
            for _ in range(3)
        ]
        self.gradient = torch.randn(
            rows, length, heads * width, device=device, dtype=torch.bfloat16, generator=generator
        )
        self.starts = fixtures.Tokens(length, 16, documents=True).batch(0, rows).document_starts

    def contestants(self) -> list[tuple[str, Attend, bool, bool]]:
        """Name, attention, whether it is confined to documents, and whether it needs CUDA."""
        forced = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        return [
            ("causal, torch's choice", causal_attention, False, False),
            *((f"causal, {name}", forced_to(backend), False, True) for name, backend in forced.items()),
            ("documents, the mask", self._masked(), True, False),
            ("documents, their borders", self._bordered, True, True),
        ]

    def measure(self, result: Result, attend: Attend, documents: bool) -> None:
        """Time forward and backward, and compare the output with float32 attention over all of the square."""
        off = self._off(attend(*self.inputs), documents)
        result.values["off by"] = off

        def both() -> None:
            attend(*self.inputs).backward(self.gradient)
            for tensor in self.inputs:
                tensor.grad = None

        seconds = timing.median_seconds(self.device, both, repeat=10, warm=3)
        rows, heads, length, width = self.shape
        # Two products forward and five backward, of half the square; documents need less, which is not counted.
        flops = 7 * rows * heads * length**2 * width
        result.values["ms"] = 1e3 * seconds
        result.values["TFLOP/s of the causal half"] = flops / seconds / 1e12
        result.require(off <= ALLOWED, f"the output is off by {off:.2e}, {ALLOWED:.0e} is allowed")

    @torch.no_grad()
    def _off(self, found: Tensor, documents: bool) -> float:
        """Relative distance of the first row's output from plain float32 arithmetic."""
        query, key, value = (tensor[:1].float() for tensor in self.inputs)
        starts = self.starts[:1].to(self.device) if documents else torch.zeros_like(self.starts[:1]).to(self.device)
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.shape[3]) + document_mask(starts, torch.float32)
        wanted = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        return ((found[:1].float() - wanted).norm() / wanted.norm()).item()

    def _masked(self) -> Attend:
        mask = document_mask(self.starts.to(self.device), torch.bfloat16)
        return lambda query, key, value: causal_attention(query, key, value, mask)

    def _bordered(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not pytorch.attends_documents(self.device, query.dtype, self.shape[3]):
            raise Skip(f"torch {torch.__version__} cannot attend by borders here")
        borders = find_borders(self.starts)
        return causal_attention(query, key, value, borders._replace(at=pytorch.send(borders.at, self.device)))


def forced_to(backend: SDPBackend) -> Attend:
    """The kit's causal attention by one kernel; torch raises where that kernel cannot."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return causal_attention(query, key, value)

    return attend
