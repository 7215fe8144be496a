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


needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this torch has no FBGEMM"
)


@needs_fbgemm
@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize(("outputs", "width"), [(96, 64), (7, 33), (5, 1), (1, 200)])
def test_packed_8_bits_multiply_what_is_rounded_to_digits(outputs, width, digits):
    torch.manual_seed(outputs)
    steps = torch.randint(-127, 128, (outputs, width), dtype=torch.int8)
    steps[0] = 127  # with the largest digits, the most that instructions for pairs of bytes must add
    scale = torch.rand(outputs) + 0.1
    x = torch.randn(6, width) * torch.logspace(-20, 20, 6)[:, None]
    x[2], x[3] = 0, x[3].abs().max()
    multiply = pytorch.pack_int8(steps, scale, digits=digits)
    got, size = multiply(x), (steps.double().abs() * scale.double()[:, None]).sum(1)
    exact = x.double() @ (steps.double() * scale.double()[:, None]).T
    rounding = x.double().abs().amax(1, keepdim=True) * (126.0**-digits + 4 * torch.finfo(torch.float32).eps)
    assert ((got.double() - exact).abs() <= rounding * size).all()
    assert torch.equal(torch.cat([multiply(row[None]) for row in x]), got)


@needs_fbgemm
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_packed_8_bits_keep_what_is_no_number(value):
    x = torch.randn(2, 8)
    x[1, 3] = value
    got = pytorch.pack_int8(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), digits=2)(x)
    assert got[0].isfinite().all()
    assert not got[1].isfinite().any()


@pytest.mark.parametrize("way", ["the engines", "an engine", "an operator", "a wrong product"])
def test_8_bits_are_not_packed_where_something_is_missing(monkeypatch, way):
    if way == "the engines":
        lacking = Without(torch.backends.quantized, "supported_engines")
        monkeypatch.setattr(pytorch.torch.backends, "quantized", lacking)
    elif way == "an engine":
        monkeypatch.setattr(pytorch, "_FBGEMM", "another")
    elif way == "an operator":
        monkeypatch.setattr(pytorch.torch, "_make_per_channel_quantized_tensor", None)
    else:
        monkeypatch.setattr(pytorch, "_multiply_digits", lambda digits, packed: torch.zeros(2, 8))
    pytorch.can_pack_int8.cache_clear()
    try:
        assert pytorch.pack_int8(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), digits=2) is None
    finally:
        monkeypatch.undo()
        pytorch.can_pack_int8.cache_clear()


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
