"""`training/attention_kernels.py` on a CPU, where torch has one fused kernel and the plain formula."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from openchatkit.distributed.layout import Layout
from openchatkit.training.attention_kernels import fastest_attention, measure_kernels, try_kernels

CPU = torch.device("cpu")
CUDA = torch.backends.cuda


def state() -> list[SDPBackend]:
    """The kernels that are enabled, in the order in which torch tries them."""
    return _cur_sdpa_kernel_backends(with_priority=True)


@pytest.fixture
def without_cudnn() -> Iterator[None]:
    """As --deterministic has it."""
    CUDA.enable_cudnn_sdp(False)
    yield
    CUDA.enable_cudnn_sdp(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_do_not_work_here_are_not_measured(dtype, recwarn):
    before = state()
    seconds = measure_kernels((2, 3, 16, 8), CPU, dtype)
    assert list(seconds) == ["FLASH_ATTENTION"]
    assert seconds["FLASH_ATTENTION"] > 0
    assert state() == before
    assert not recwarn


def test_kernels_are_tried_in_the_order_given_and_none_that_was_disabled(without_cudnn):
    before = state()
    assert SDPBackend.CUDNN_ATTENTION not in before
    with try_kernels(["EFFICIENT_ATTENTION", "FLASH_ATTENTION"]):
        assert state() == [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert state()[:3] == before[:3]


def test_on_a_cpu_torch_chooses():
    before = state()
    with fastest_attention(None, None, Layout(0, CPU)):
        assert state() == before
