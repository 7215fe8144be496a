"""The same bits from every run on a GPU, where torch's fastest kernels add in whatever order their threads finish."""

import os

import torch

from openchatkit.errors import UserError

# cuBLAS reads it when it starts, with the first product; torch knows of these two that both keep its sums in order.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")


def make_deterministic() -> None:
    """Let torch use kernels alone whose results do not vary from run to run; call it before CUDA is first used.

    UserError where the environment asks cuBLAS for the opposite. The CPU's kernels need none of it.
    """
    given = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if given not in _WORKSPACES:
        raise UserError(
            f"{_WORKSPACE}={given}: --deterministic needs {' or '.join(_WORKSPACES)}; unset it for the first"
        )
    torch.use_deterministic_algorithms(True)
    # Else every new tensor is filled first, in case that someone reads it before it is written; here nobody does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Flash and memory-efficient attention have backward passes that keep the order; cuDNN's has none.
    torch.backends.cuda.enable_cudnn_sdp(False)
