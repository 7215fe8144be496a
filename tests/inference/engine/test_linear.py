"""Linear layers of 8 bits and packed ones, against float64 and nn.Linear."""

import time
import weakref

import pytest
import torch
from torch import nn

from openchatkit.inference.engine import linear
from openchatkit.libraries import pytorch
from openchatkit.loading import hardware

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
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_8_bits_is_as_near_to_float64_as_its_steps_allow(width, outputs, dtype, rows, packed):
    original = layer(width, outputs, torch.float32)
    made = linear.Int8Linear(original, device=CPU, dtype=dtype)
    weight = made.weight.double() * made.scale.double()[:, None]
    if packed:
        made.pack()
    x = torch.randn(1, rows, width).to(dtype)
    got = made(x)
    assert (got.dtype, got.shape) == (dtype, (1, rows, outputs))
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
    made.append(linear.NarrowLinear(original, torch.bfloat16))
    made.append(linear.PackedLinear(original, torch.bfloat16))
    x = torch.randn(64, 5).to(torch.bfloat16).T
    for one in made:
        torch.testing.assert_close(one(x), one(x.contiguous()))
        assert one.bias is None


@pytest.mark.parametrize("rows", [1, 2, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_a_packed_layer_is_the_layer(width, outputs, dtype, bias, rows):
    original = layer(width, outputs, dtype, bias=bias)
    x = torch.randn(1, rows, width).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(linear.PackedLinear(original, dtype)(x), original(x))


def test_layers_are_replaced_one_by_one_and_the_originals_go():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Embedding(3, 4))
    alive, most = [], 0

    def make(name, original):
        nonlocal most
        alive.append(weakref.ref(original.weight))
        most = max(most, sum(held() is not None for held in alive))
        return nn.Identity()

    assert linear.linear_bytes(model, torch.float32) == 2 * 4 * 4 * 4
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


class Reading(nn.Module):
    """A layer that reads the weight of one of its linears by itself, as Jamba's do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(x @ self.inner.proj.weight.T)


class Inheriting(Reading):
    pass


@pytest.mark.parametrize("kind", [Reading, Inheriting])
def test_a_layer_whose_weight_is_read_by_others_stays(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind())
    assert linear.linear_names(model) == ["0", "1.inner.0", "1.out"]
    assert linear.linear_bytes(model, torch.float32) == 3 * 4 * 4 * 4
    linear.prepare(model, torch.float32, room=1e9)
    assert type(model[1].inner.proj) is nn.Linear
    assert model(torch.ones(2, 4)).shape == (2, 4)


@pytest.fixture
def emulating(monkeypatch):
    """A processor that has no instructions for 16 bits."""
    monkeypatch.setattr(hardware, "computes_in", lambda device, dtype: dtype == torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 70])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_a_narrow_layer_is_as_near_to_float64_as_its_results_rounding_allows(
    monkeypatch, width, outputs, dtype, bias, rows
):
    monkeypatch.setattr(linear, "_BLOCK", 200)
    original = layer(width, outputs, dtype, bias=bias)
    made = linear.NarrowLinear(original, dtype)
    assert made.weight.data_ptr() == original.weight.data_ptr()
    x = torch.randn(1, rows, width).to(dtype)
    got, weight = made(x), original.weight.double()
    assert (got.dtype, got.shape) == (dtype, (1, rows, outputs))
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    if bias:
        exact, size = exact + original.bias.double(), size + original.bias.double().abs()
    smallest = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounding = 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * size + smallest
    # Few rows round the product before the bias is added.
    rounding = rounding + (torch.finfo(dtype).eps * size if rows <= 4 else 0)
    assert ((got.double() - exact).abs() <= rounding).all()


@pytest.mark.parametrize("rows", [1, linear.FEW_ROWS + 1])
def test_8_bits_are_widened_where_16_are_not_computed(emulating, rows):
    original = layer(64, 96, torch.float32)
    made = linear.Int8Linear(original, device=CPU, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 64).to(torch.bfloat16)
    weight = made.weight.double() * made.scale.double()[:, None]
    exact, size = x.double() @ weight.T + original.bias.double(), x.double().abs() @ weight.T.abs()
    assert ((made(x).double() - exact).abs() <= 3 * torch.finfo(torch.bfloat16).eps * (size + exact.abs())).all()


def test_a_layer_of_weights_that_were_quantised_before_is_the_layer():
    made = linear.Int8Linear(layer(64, 96, torch.float32), device=CPU, dtype=torch.bfloat16)
    again = linear.Int8Linear.of(made.weight, made.scale, made.bias, dtype=torch.bfloat16)
    x = torch.randn(3, 64).to(torch.bfloat16)
    assert torch.equal(made(x), again(x))
    assert again.weight.data_ptr() == made.weight.data_ptr()


def kinds(model: nn.Module) -> list[type]:
    return [type(part) for part in model]


def test_a_model_gets_the_layers_that_are_fastest_here(monkeypatch):
    def prepared(dtype, room=1e9):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        linear.prepare(model, dtype, room=room)
        assert all(tensor.dtype == dtype for tensor in model.state_dict().values())
        return kinds(model)

    packed = pytorch.can_pack(torch.float32)
    assert prepared(torch.float32) == [linear.PackedLinear if packed else nn.Linear, nn.LayerNorm]
    assert prepared(torch.float32, room=63) == [nn.Linear, nn.LayerNorm]
    monkeypatch.setattr(hardware, "computes_in", lambda device, dtype: True)
    assert prepared(torch.bfloat16, room=31) == [nn.Linear, nn.LayerNorm]
    monkeypatch.setattr(hardware, "computes_in", lambda device, dtype: dtype == torch.float32)
    # They take no room, since they copy nothing.
    for dtype in (torch.bfloat16, torch.float16):
        assert prepared(dtype, room=0) == [linear.NarrowLinear, nn.LayerNorm]


@pytest.mark.skipif(not pytorch.can_pack_int8(), reason="this torch has no FBGEMM")
def test_threads_that_pack_leave_the_process_its_setting_and_pack_for_one_library(monkeypatch):
    engine, engines = torch.backends.quantized.engine, []
    pack = pytorch.pack_int8

    def slow(*arguments, **options):
        time.sleep(0.001 * (len(engines) % 3))
        packed = pack(*arguments, **options)
        engines.append(torch.backends.quantized.engine)
        return packed

    monkeypatch.setattr(pytorch, "pack_int8", slow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model = nn.Sequential(
        *(linear.Int8Linear(layer(64, 96, torch.float32), device=CPU, dtype=torch.bfloat16) for _ in range(40))
    )
    linear.pack_int8(model, room=1e9)
    assert set(engines) == {"fbgemm"}
    assert torch.backends.quantized.engine == engine
    assert all(each.weight is None for each in model)
