"""Changes in torch: each implementation of a product, and where it is chosen."""

import pytest
import torch
from torch.nn import functional

from openchatkit.libraries import pytorch


class Without:
    """A module of torch that lacks some names."""

    def __init__(self, whole: object, *names: str) -> None:
        self._whole, self._names = whole, names

    def __getattr__(self, name: str) -> object:
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._whole, name)


def operators(monkeypatch, mkldnn: object) -> None:
    monkeypatch.setattr(pytorch.torch, "ops", type("Operators", (), {"mkldnn": mkldnn}))


def test_packing_is_for_precisions_and_processors_that_gain_by_it(monkeypatch):
    assert not pytorch.can_pack(torch.float16)
    monkeypatch.setattr(pytorch.platform, "machine", lambda: "arm64")
    assert not pytorch.can_pack(torch.float32)


@pytest.mark.parametrize("way", ["as it is here", "no operator", "an operator that refuses"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_product(monkeypatch, way, bias):
    weight, x = torch.randn(7, 32), torch.randn(2, 3, 32)
    bias = torch.randn(7) if bias else None
    expected = functional.linear(x, weight, bias)
    if way == "no operator":
        operators(monkeypatch, Without(torch.ops.mkldnn, "_reorder_linear_weight"))
    elif way == "an operator that refuses":

        def refuse(*_):
            raise RuntimeError("needs another processor")

        monkeypatch.setattr(pytorch, "can_pack", lambda dtype: True)
        operators(monkeypatch, type("Mkldnn", (), {"_reorder_linear_weight": staticmethod(refuse)}))
    torch.testing.assert_close(pytorch.pack(weight, bias)(x), expected)


@pytest.mark.parametrize("width", [64, 33])
@pytest.mark.parametrize("operator", [True, False])
def test_a_product_with_8_bits_is_the_product(monkeypatch, operator, width):
    steps = torch.randint(-127, 128, (96, width), dtype=torch.int8)
    scale, x = torch.rand(96).to(torch.bfloat16), torch.randn(width, 3).to(torch.bfloat16).T
    if not operator:
        monkeypatch.delattr(torch, "_weight_int8pack_mm", raising=False)
    got = pytorch.multiply_int8(x, steps, scale)
    exact = (x.double() @ steps.double().T) * scale.double()
    size = (x.double().abs() @ steps.double().abs().T) * scale.double()
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * size).all()
