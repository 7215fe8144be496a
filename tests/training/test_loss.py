"""`training/loss.py` against a float64 reference: ignored rows, chunks that do not divide, biases and scales."""

import copy
import math
from functools import partial

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from openchatkit.libraries import pytorch
from openchatkit.training.loss import VocabularyLoss


def case(tokens: int, *, bias: bool, ignored: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    projection = nn.Linear(24, 101, bias=bias)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.normal_(generator=generator)
    hidden = torch.randn(tokens, 24, generator=generator)
    labels = torch.randint(0, 101, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return projection, hidden, labels


def reference(projection, hidden, labels, scale):
    weight = projection.weight.detach().double().requires_grad_()
    bias = None if projection.bias is None else projection.bias.detach().double().requires_grad_()
    hidden = hidden.detach().double().requires_grad_()
    total = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=-100, reduction="sum") * scale
    total.backward()
    return total, hidden.grad, weight.grad, None if bias is None else bias.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("chunk", [1024, 16, 7])
def test_value_and_gradients(bias, ignored, chunk):
    projection, hidden, labels = case(50, bias=bias, ignored=ignored)
    expected, *gradients = reference(projection, hidden, labels, 0.25)
    hidden = hidden.view(5, 10, 24).requires_grad_()
    found = VocabularyLoss(projection, chunk_tokens=chunk)(hidden, labels.view(5, 10), scale=0.25)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-12)
    if ignored == 1.0:
        assert found.item() == 0
        assert not hidden.grad.any()
        assert projection.weight.grad is None
        return
    for ours, theirs in zip(
        [hidden.grad.flatten(0, 1), projection.weight.grad, *([projection.bias.grad] if bias else [])],
        [g for g in gradients if g is not None],
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_gradients_add_up_over_calls():
    projection, hidden, labels = case(20, bias=True, ignored=0.2)
    for piece in (slice(0, 8), slice(8, 20)):
        VocabularyLoss(projection)(hidden[piece].requires_grad_(), labels[piece]).backward()
    _, _, weight, bias = reference(projection, hidden, labels, 1.0)
    assert (projection.weight.grad - weight).abs().max() <= 1e-5 * weight.abs().max()
    assert (projection.bias.grad - bias).abs().max() <= 1e-5 * bias.abs().max()


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("gradients", [True, False])
def test_losses_by_source(chunk, gradients):
    """Sums over each source's tokens, as a plain computation in float64 has them, and the same bits in all the rest."""
    projection, hidden, labels = case(60, bias=True, ignored=0.4)
    hidden, labels = hidden.view(6, 10, 24), labels.view(6, 10)
    sources = torch.tensor([2, 0, 2, 2, 3, 0]).unsqueeze(1).expand_as(labels)
    sums = torch.zeros(5, dtype=torch.float64)
    found = []
    for with_sources in (False, True):
        projection.weight.grad = projection.bias.grad = None
        x = hidden.clone().requires_grad_()
        more = {"sources": sources, "sums": sums} if with_sources else {}
        with torch.set_grad_enabled(gradients):
            total = VocabularyLoss(projection, chunk_tokens=chunk)(x, labels, scale=0.25, **more)
        if gradients:
            total.backward()
        found.append([total.detach(), x.grad, projection.weight.grad, projection.bias.grad])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    logits = F.linear(hidden.double(), projection.weight.double(), projection.bias.double()).detach()
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(6, 10)
    expected = [each[sources == source].sum().item() for source in range(5)]
    assert sums.tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[1] == expected[4] == 0


def test_without_gradients_nothing_is_touched():
    projection, hidden, labels = case(20, bias=True, ignored=0.2)
    with torch.no_grad():
        found = VocabularyLoss(projection)(hidden, labels)
    assert found.item() == pytest.approx(reference(projection, hidden, labels, 1.0)[0].item(), rel=1e-6)
    assert projection.weight.grad is None


def test_bfloat16_is_as_exact_as_autocast():
    """Against float64, no further off than the same loss written with autocast and whole logits."""
    projection, hidden, labels = case(200, bias=False, ignored=0.3)
    expected, _, weight, _ = reference(projection, hidden, labels, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = VocabularyLoss(projection)(hidden, labels)
    gradient = projection.weight.grad
    projection.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(projection(hidden).float(), labels, ignore_index=-100, reduction="sum")
    plain.backward()
    assert (ours - expected).abs() <= 1.5 * (plain - expected).abs() + 1e-3 * expected
    assert (gradient - weight).norm() <= 1.5 * (projection.weight.grad - weight).norm()


def test_large_logits_do_not_overflow():
    projection, hidden, labels = case(10, bias=False, ignored=0.0)
    found = VocabularyLoss(projection)(hidden * 1e4, labels)
    assert torch.isfinite(found)
    assert torch.isfinite(projection.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_certain_and_unlikely_tokens_keep_their_digits(dtype):
    """Logits are whole numbers, exact in every dtype, so what is left is the softmax: near p = 1 and near p = 0."""
    generator = torch.Generator().manual_seed(3)
    projection = nn.Linear(8, 64, bias=False)
    with torch.no_grad():
        projection.weight.copy_(torch.randint(-3, 4, (64, 8), generator=generator))
    hidden = torch.randint(-3, 4, (400, 8), generator=generator).float()
    logits = (hidden.double() @ projection.weight.double().T).detach()
    labels = torch.where(torch.arange(400) % 2 == 0, logits.argmax(-1), logits.argmin(-1))
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert expected.min() < 1e-3
    assert expected.max() > 20
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    smallest = 6e-8 if dtype == torch.float16 else 0.0  # what float16 can hold
    for row in range(400):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            x = hidden[row : row + 1].clone().requires_grad_()
            projection.weight.grad = None
            found = VocabularyLoss(projection)(x, labels[row : row + 1])
        found.backward()
        assert found.item() == pytest.approx(expected[row].item(), rel=tolerance, abs=smallest), row
        # With one token, the gradient of the label's row of W is (p[y] - 1) h.
        wanted = torch.expm1(-expected[row]).item() * hidden[row]
        assert torch.allclose(projection.weight.grad[labels[row]], wanted, rtol=tolerance, atol=3 * smallest), row


@pytest.fixture(params=["float32 operands", "widened products"])
def products(request, monkeypatch):
    """Both ways to the products of float16's gradients; that of a GPU with its arithmetic: float16 in, float32 out."""
    if request.param == "widened products":

        def multiply(left, right):
            assert left.dtype == right.dtype == torch.float16
            return left.float() @ right.float()

        monkeypatch.setattr(pytorch, "widens_products", lambda device: True)
        monkeypatch.setattr(pytorch, "mm_in_float32", multiply)


@pytest.mark.parametrize("loss_scale", [32.0, 2.0**-10, 2.0**15])
@pytest.mark.usefixtures("products")
def test_float16_gradients_do_not_overflow_before_the_loss_scale(loss_scale):
    """One label for all of a chunk and one channel of 80: unscaled, the label's row sums to 81,920 there."""
    projection, hidden, labels = case(1024, bias=True, ignored=0.0)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_((parameter * 0.01).half())
        hidden[:, 3] = 80.0
    hidden, labels = hidden.half().float(), torch.full_like(labels, 7)
    scale = loss_scale / 1024
    expected = reference(projection, hidden, labels, scale)[1:]
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        VocabularyLoss(projection)(hidden, labels, scale=scale).backward()
    for ours, theirs in zip([hidden.grad, projection.weight.grad, projection.bias.grad], expected, strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm()


@pytest.mark.usefixtures("products")
def test_float16_keeps_entries_that_only_the_loss_scale_lifts_into_its_range():
    """Labels so certain that every other entry of p is below float16's smallest number, 6e-8."""
    projection, _, _ = case(1, bias=False, ignored=0.0)
    with torch.no_grad():
        projection.weight.zero_()
        projection.weight[7] = 1.0
        projection.weight[:, 1] = torch.where(torch.arange(101) == 7, 4, torch.arange(101) % 3)
    hidden = torch.zeros(50, 24)
    hidden[:, 0] = 18.0
    hidden[:, 2] = torch.arange(50) % 5 / 4
    labels = torch.full((50,), 7)
    _, by_hidden, by_weight, _ = reference(projection, hidden, labels, 2.0**20)
    assert torch.softmax(hidden.double() @ projection.weight.double().T, -1)[:, 8].max() < 6e-8
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        VocabularyLoss(projection)(hidden, labels, scale=2.0**20).backward()
    assert torch.allclose(hidden.grad.double(), by_hidden, rtol=2e-3, atol=0)
    assert torch.allclose(projection.weight.grad.double(), by_weight, rtol=2e-3, atol=0)


def test_float16_products_of_a_device_without_a_way_to_widen_them():
    assert not pytorch.widens_products(torch.device("cpu"))
    assert pytorch.widens_products(torch.device("meta"))


# Cut vocabularies. Of 101 rows, so that parts are of two sizes.
PLAIN = [(bias, ignored, chunk) for bias in (False, True) for ignored in (0.0, 0.6, 1.0) for chunk in (1024, 7)]
HALVES = [torch.bfloat16, torch.float16]


def certain_and_unlikely():
    """Whole numbers as logits, as above; the first half of the labels are near p = 1, the other near p = 0."""
    generator = torch.Generator().manual_seed(3)
    projection = nn.Linear(8, 101, bias=False)
    with torch.no_grad():
        projection.weight.copy_(torch.randint(-3, 4, (101, 8), generator=generator))
    hidden = torch.randint(-3, 4, (200, 8), generator=generator).float()
    logits = hidden @ projection.weight.detach().T
    return projection, hidden, torch.cat([logits[:100].argmax(-1), logits[100:].argmin(-1)])


def each_label():
    projection, hidden, _ = case(101, bias=True, ignored=0.0)
    return projection, hidden, torch.arange(101)


def far_apart():
    """The first rows are so much likelier than all others that the exponentials of those are 0."""
    projection, hidden, labels = case(40, bias=True, ignored=0.0)
    with torch.no_grad():
        projection.bias[:10] += 300.0
    return projection, hidden, labels % 20


def not_finite():
    projection, hidden, labels = case(9, bias=False, ignored=0.0)
    hidden[3] = math.nan
    return projection, hidden, labels


def overflowing():
    projection, hidden, labels = case(9, bias=False, ignored=0.0)
    return projection, hidden * 1e4, labels


def cut_cases():
    """Yield projection, hidden states, labels, dtype of the products and tokens in a chunk."""
    for bias, ignored, chunk in PLAIN:
        yield *case(50, bias=bias, ignored=ignored), torch.float32, chunk
    for made in (each_label, far_apart, not_finite, overflowing):
        yield *made(), torch.float32, 16
    for dtype in (torch.float32, *HALVES):
        yield *certain_and_unlikely(), dtype, 16
    for dtype in HALVES:
        yield *case(200, bias=True, ignored=0.3), dtype, 64


def take_loss(projection, hidden, labels, dtype, chunk, **group):
    """Loss, losses by source, and gradients of hidden, weight and bias."""
    projection, hidden = copy.deepcopy(projection), hidden.clone().requires_grad_()
    sources, sums = torch.arange(len(labels)) * 3 // len(labels), torch.zeros(3, dtype=torch.float64)
    loss = VocabularyLoss(projection, chunk_tokens=chunk, **group)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = loss(hidden, labels, scale=0.25, sources=sources, sums=sums)
        with torch.no_grad():
            evaluated = loss(hidden, labels, scale=0.25)
    assert torch.equal(total, evaluated) or total.isnan()
    total.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in projection.parameters()]
    return [total.detach(), sums, hidden.grad, *gradients]


def take_losses_of_a_part(count, rank):
    first, last = rank * 101 // count, (rank + 1) * 101 // count
    found = []
    for projection, *rest in cut_cases():
        part = nn.Linear(projection.in_features, last - first, bias=projection.bias is not None)
        part.load_state_dict({name: whole[first:last] for name, whole in projection.state_dict().items()})
        found.append(take_loss(part, *rest, group=dist.group.WORLD, first=first))
    return found


@pytest.fixture(scope="module", params=[2, 4])
def cut_losses(request, tmp_path_factory):
    """For each case what all ranks found: loss and losses by source of each, shares of hidden's gradient, and rows."""
    folder = tmp_path_factory.mktemp("losses")
    ranks = gloo_ranks.run(partial(take_losses_of_a_part, request.param), request.param, folder)
    return [
        (total, sums, sum(by_hidden), *map(torch.cat, gradients))
        for total, sums, by_hidden, *gradients in (zip(*each, strict=True) for each in zip(*ranks, strict=True))
    ]


def test_a_cut_vocabulary_has_the_loss_and_gradients_of_the_whole(cut_losses):
    for number, (found, arguments) in enumerate(zip(cut_losses, cut_cases(), strict=True)):
        totals, sums, *gradients = found
        whole_total, whole_sums, *whole_gradients = take_loss(*arguments)
        assert all(torch.equal(total, totals[0]) or total.isnan() for total in totals), number
        assert all(torch.equal(each, sums[0]) or each.isnan().any() for each in sums), number
        assert torch.isnan(whole_total) == all(map(torch.isnan, totals)), number
        if whole_total.isnan():
            assert all(gradient.isnan().any() for gradient in gradients)
            continue
        rough = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[arguments[3]]
        assert totals[0].item() == pytest.approx(whole_total.item(), rel=rough, abs=1e-12), number
        assert sums[0].tolist() == pytest.approx(whole_sums.tolist(), rel=rough, abs=1e-12), number
        for ours, theirs in zip(gradients, whole_gradients, strict=True):
            assert (ours - theirs).norm() <= rough * theirs.norm(), number
        # Of each token, too: those near certainty have little of the whole gradient.
        apart, size = (each.norm(dim=-1) for each in (gradients[0] - whole_gradients[0], whole_gradients[0]))
        assert (apart <= {torch.float32: 1e-5}.get(arguments[3], 3e-2) * size).all(), number


def test_a_cut_vocabulary_in_half_precision_is_as_exact_as_the_whole(cut_losses):
    """Against float64, in loss and gradients; certain and unlikely tokens keep their digits."""
    for found, arguments in zip(cut_losses, cut_cases(), strict=True):
        projection, hidden, labels, dtype, _ = arguments
        if dtype == torch.float32:
            continue
        whole = take_loss(*arguments)
        expected = [each for each in reference(projection, hidden, labels, 0.25) if each is not None]
        assert abs(found[0][0] - expected[0]) <= 2 * abs(whole[0] - expected[0]) + 2e-3 * expected[0]
        for ours, theirs, exact in zip(found[2:], whole[2:], expected[1:], strict=True):
            assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3 * exact.norm()
