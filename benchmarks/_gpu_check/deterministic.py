"""The step that correctness.py takes twice, with torch's deterministic algorithms: there the bits must be the same.

A process of its own, because cuBLAS reads its setting from the environment when it starts.
"""

import torch

from _gpu_check import correctness
from _gpu_check.rows import Context


def run(context: Context) -> None:
    """Take the steps."""
    torch.use_deterministic_algorithms(True)
    # Of the fused kernels, cuDNN's has no backward that keeps the order of sums.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for packing, documents in correctness.PACKINGS.items():
        context.check(
            f"a step twice, {packing}",
            lambda result, documents=documents: correctness.twice(result, context, documents=documents, required=True),
        )
