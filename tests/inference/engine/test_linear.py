"""Linear layers of 8 bits and packed ones, against float64 and nn.Linear."""

import weakref

import pytest
import torch
from torch import nn

from openchatkit.inference.engine import linear

CPU = torch.device("cpu")
# Widths that the CPU's operator takes and others, and one that spreads over several blocks when those are small.
SHAPES = [(64, 96), (32, 7), (33, 20), (40, 8), (1, 5), (128, 50)]


def layer(width: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(width * outputs)
    made = nn.Linear(width, outputs, bias=bias)
    with torch.no_grad():
        # Channels of very different sizes, and one of zeros.
        made.weight *= torch.logspace(-4, 1, outputs)[:, None]
        made.weight[outputs // 2] = 0
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_a_quantised_weight_is_within_half_a_step(monkeypatch, width, outputs, dtype):
    monkeypatch.setattr(linear, "_BLOCK", 200)
    weight = layer(width, outputs, torch.float32).weight.detach()
    steps, scale = linear.quantise(weight, device=CPU, scale_dtype=dtype)
    assert steps.dtype == torch.int8
    assert steps.abs().max() <= 127
    error = (steps.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    assert (scale.double() <= weight.abs().amax(dim=1).double() / 126).logical_or(weight.abs().amax(dim=1) == 0).all()


@pytest.mark.parametrize("rows", [1, 3, linear.FEW_ROWS, linear.FEW_ROWS + 1, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_a_layer_of_8_bits_is_as_near_to_float64_as_its_steps_allow(width, outputs, dtype, rows):
    original = layer(width, outputs, torch.float32)
    made = linear.Int8Linear(original, device=CPU, dtype=dtype)
    x = torch.randn(1, rows, width).to(dtype)
    got = made(x)
    assert (got.dtype, got.shape) == (dtype, (1, rows, outputs))
    weight = made.weight.double() * made.scale.double()[:, None]
    exact = x.double() @ weight.T + original.bias.double()
    # Two roundings of the result, and one of each weight, product or sum on the way there.
    size = x.double().abs() @ weight.abs().T + original.bias.double().abs()
    assert ((got.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size + 1e-6).all()
    whole = x.double() @ original.weight.double().T + original.bias.double()
    steps = 0.5001 * x.double().abs().sum(dim=-1, keepdim=True) * made.scale.double()
    assert ((exact - whole).abs() <= steps).all()


def test_float16_has_room_for_what_a_layer_of_8_bits_adds_up():
    original = nn.Linear(4096, 4, bias=False)
    nn.init.constant_(original.weight, 0.001)
    made = linear.Int8Linear(original, device=CPU, dtype=torch.float16)
    torch.testing.assert_close(
        made(torch.ones(1, 4096, dtype=torch.float16)).float(), torch.full((1, 4), 4.096), rtol=0.01, atol=0
    )


def test_a_layer_reads_inputs_that_are_not_contiguous():
    original = layer(64, 96, torch.bfloat16, bias=False)
    made = [linear.Int8Linear(original, device=CPU, dtype=torch.bfloat16)]
    if linear.can_pack(torch.bfloat16):
        made.append(linear.PackedLinear(original))
    x = torch.randn(64, 5).to(torch.bfloat16).T
    for one in made:
        torch.testing.assert_close(one(x), one(x.contiguous()))
        assert one.bias is None


@pytest.mark.parametrize("rows", [1, 2, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_a_packed_layer_is_the_layer(width, outputs, dtype, bias, rows):
    if not linear.can_pack(dtype):
        pytest.skip("oneDNN does not compute this precision here")
    original = layer(width, outputs, dtype, bias=bias)
    x = torch.randn(1, rows, width).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(linear.PackedLinear(original)(x), original(x))


def test_layers_are_replaced_one_by_one_and_the_originals_go():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Embedding(3, 4))
    alive, most = [], 0

    def make(original):
        nonlocal most
        alive.append(weakref.ref(original.weight))
        most = max(most, sum(held() is not None for held in alive))
        return nn.Identity()

    assert linear.linear_bytes(model) == 2 * 4 * 4 * 4
    linear.replace(model, make, "replacing")
    assert [type(module).__name__ for module in model.modules()][1:] == [
        "Identity",
        "Sequential",
        "Identity",
        "LayerNorm",
        "Embedding",
    ]
    # The one that is being replaced, and the one before it, which the loop lets go of with the next.
    assert most <= 2


def test_packing_is_for_processors_that_compute_the_precision(monkeypatch):
    assert not linear.can_pack(torch.float16)
    monkeypatch.setattr(linear.platform, "machine", lambda: "arm64")
    assert not linear.can_pack(torch.float32)
