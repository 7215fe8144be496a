"""`models/documents.py`: attention by the borders of documents is that by their mask.

The CPU has no kernel for borders. `segments_kernel` gives torch one, a loop over the documents, so that all around the
kernel is torch's own: `varlen_attn`, its backward, recomputing and compilation.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from model_configs import FAMILIES, OPTIONS
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from openchatkit.libraries import pytorch
from openchatkit.models.cuts import Part, cut_shard
from openchatkit.models.documents import Borders, confine, document_mask, find_borders
from openchatkit.models.layers import RotaryTable, causal_attention
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.stage import Stage

CPU = torch.device("cpu")
KINDS = FAMILIES | {"options": OPTIONS}
STARTS = torch.tensor(
    [
        [0] * 10 + [10] * 14,
        [0] * 24,
        list(range(24)),
        [0, 1, 1, 1, 1, 5] + [6] * 17 + [23],
    ]
)


def weigh(query: Tensor, key: Tensor, before: int = -1) -> Tensor:
    """Attention's weights of one segment, [heads, tokens, tokens], of [tokens, heads, head_dim].

    A token sees itself and `before` tokens before it, -1 for all.
    """
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    if before >= 0:
        hidden |= torch.ones_like(hidden).tril(-before - 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def check_contract(query: Tensor, borders: Tensor, others: Tensor, longest: int, limit: int, options: dict) -> None:
    """What flash attention demands of its arguments."""
    assert borders.dtype == others.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == query.shape[0]
    assert torch.equal(borders, others)
    sizes = borders.diff()
    assert (sizes >= 0).all()
    assert longest == limit == sizes.max()
    assert options["window_size_right"] == 0
    assert query.stride(-1) == 1


def forward(query, key, value, borders, others, longest, limit, dropout, causal, debug, **options):
    assert causal == (options["window_size_left"] < 0)  # a window says it by itself
    assert not dropout
    check_contract(query, borders, others, longest, limit, options)
    out = torch.empty_like(query)
    for first, last in itertools.pairwise(borders.tolist()):
        q, k, v, o = (tensor[first:last] for tensor in (query, key, value, out))
        o.copy_(torch.einsum("hqk,khd->qhd", weigh(q, k, options["window_size_left"]), v))
    unused = torch.empty(0)
    return out, torch.empty(query.shape[1], query.shape[0]), unused.to(torch.uint64), unused.to(torch.uint64), unused


def backward(grad, query, key, value, out, lse, borders, others, longest, limit, dropout, causal, *_, **options):
    assert causal == (options["window_size_left"] < 0)  # a window says it by itself
    check_contract(query, borders, others, longest, limit, options)
    by_query, by_key, by_value = (torch.empty_like(query) for _ in range(3))
    for first, last in itertools.pairwise(borders.tolist()):
        q, k, v, o, g = (tensor[first:last] for tensor in (query, key, value, out, grad))
        weights = weigh(q, k, options["window_size_left"])
        by_scores = torch.einsum("qhd,khd->hqk", g, v) - (g * o).sum(-1).T.unsqueeze(-1)
        by_scores = by_scores * weights / q.shape[-1] ** 0.5
        by_query[first:last] = torch.einsum("hqk,khd->qhd", by_scores, k)
        by_key[first:last] = torch.einsum("hqk,qhd->khd", by_scores, q)
        by_value[first:last] = torch.einsum("hqk,qhd->khd", weights, g)
    return by_query, by_key, by_value


@pytest.fixture
def segments_kernel() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    pytorch.attends_documents.cache_clear()
    yield
    library._destroy()
    pytorch.attends_documents.cache_clear()


def test_borders_are_where_documents_begin_in_rows_laid_end_to_end():
    borders = find_borders(STARTS)
    assert borders.at.dtype == torch.int32
    assert borders.at.tolist() == [0, 10, 24, *range(48, 72), 72, 73, 77, 78, 95, 96]
    assert borders.longest == 24
    assert find_borders(STARTS[2:3]).longest == 1


def test_starts_that_are_not_documents_have_no_borders():
    with pytest.raises(AssertionError, match="no documents' starts"):
        find_borders(torch.tensor([[0, 0, 1, 2]]))


def test_without_a_kernel_there_is_a_mask():
    assert not pytorch.attends_documents(CPU, torch.float32, 8)
    documents = confine(STARTS, device=CPU, dtype=torch.float32, head_dim=8)
    assert torch.equal(documents.seen, document_mask(STARTS, torch.float32))
    assert documents.positions[3].tolist() == [0, 0, 1, 2, 3, 0, *range(17), 0]


def test_tokens_after_others_have_a_mask(segments_kernel):
    rows, after = (confine(STARTS + n, before=n, device=CPU, dtype=torch.float32, head_dim=8) for n in (0, 3))
    assert isinstance(rows.seen, Borders)
    assert isinstance(after.seen, Tensor)
    assert torch.equal(after.positions, rows.positions)


def test_attention_by_borders_is_that_by_the_mask(segments_kernel):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 3, 24, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    gradient = torch.randn(4, 24, 24, dtype=torch.float64, generator=generator)
    results = []
    for seen in (find_borders(STARTS), document_mask(STARTS, torch.float64)):
        found = causal_attention(*inputs, seen)
        results.append([found, *torch.autograd.grad(found, inputs, gradient)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def gradients(kind: str, **options: bool) -> list[Tensor]:
    stage = Stage(config_from_hf(KINDS[kind]), **options).double()
    stage.init_weights(0)
    tokens = torch.arange(96).reshape(4, 24) % 64
    stage.logits(stage(tokens, STARTS)).square().mean().backward()
    return [parameter.grad for parameter in stage.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_models_learn_the_same_by_borders(kind, request):
    wanted = gradients(kind)
    request.getfixturevalue("segments_kernel")
    plain = gradients(kind)
    for one, other in zip(plain, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    for options in ({"recompute": True}, {"recompute": True, "selective": True}):
        assert all(torch.equal(one, other) for one, other in zip(gradients(kind, **options), plain, strict=True))


def test_windows_are_seen_by_borders_as_by_masks(request):
    """Of documents, and of rows that are one each."""
    raw = FAMILIES["neox"] | {"model_type": "neox", "sliding_window_width": 4}
    stage = Stage(config_from_hf(raw)).double()
    stage.init_weights(0)
    tokens = torch.arange(96).reshape(4, 24) % 64
    found = []
    for by_borders in (False, True):
        if by_borders:
            request.getfixturevalue("segments_kernel")
        for starts in (STARTS, None):
            stage.zero_grad()
            logits = stage.logits(stage(tokens, starts))
            logits.square().mean().backward()
            found.append([logits.detach(), *(parameter.grad for parameter in stage.parameters())])
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", FAMILIES)
def test_parts_of_a_layer_by_borders_add_up_to_the_whole(kind, segments_kernel):
    config, name = config_from_hf(FAMILIES[kind]), "layer_00000"
    module, cuts = family(config).module, family(config).cuts(config)
    whole, documents = module(config, name).double(), confine(STARTS, device=CPU, dtype=torch.float64, head_dim=8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 24, 32, dtype=torch.float64, generator=generator)
    cos, sin = RotaryTable(config.rotary_dim, config.rotary_base)(24, CPU)
    places = [table[documents.positions].unsqueeze(1) for table in (cos, sin)]
    added = torch.zeros_like(x)
    for index in range(2):
        part = Part(index, 2)
        layer = module(config, name, part).double()
        layer.load_state_dict(cut_shard(whole.state_dict(), cuts, part))
        added += layer(x, *places, documents.seen) - x
    torch.testing.assert_close(x + added, whole(x, *places, documents.seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_run_one_compiled_program_by_borders(kind, segments_kernel):
    """Without a break. Number of documents and length of the longest become variables of the program one by one."""
    programs = []

    def keep(module: torch.fx.GraphModule, _: object) -> object:
        programs.append(module)
        return module.forward

    tokens = torch.arange(48).reshape(2, 24) % 64
    stage = Stage(config_from_hf(KINDS[kind]))
    stage.init_weights(0)
    batches = [STARTS[:2], STARTS[1:3], STARTS[2:], torch.tensor([[0] * 7 + [7] * 17, [0] * 9 + [9] * 15])]
    plain = [stage(tokens, starts) for starts in batches]
    torch.compiler.reset()
    stage.compile_layers(keep)
    assert all(torch.equal(stage(tokens, starts), wanted) for starts, wanted in zip(batches, plain, strict=True))
    assert len(programs) <= 3
    stage(tokens, torch.tensor([[0] * 3 + [3] * 8 + [11] * 13, [0] * 20 + [20, 21, 22, 23]]))
    assert len(programs) <= 3


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_ask_for_no_number_of_their_tensors(kind):
    """A GPU would be waited for. Fake tensors have no numbers: an operator that needs one is an error."""
    config = config_from_hf(FAMILIES[kind])
    with FakeTensorMode():
        layer = family(config).module(config, "layer_00000")
        x = torch.empty(2, 24, 32)
        cos = torch.empty(2, 1, 24, config.rotary_dim // 2)
        borders = Borders(torch.empty(7, dtype=torch.int32), 24)
        assert layer(x, cos, cos, borders).shape == x.shape
        with pytest.raises(DataDependentOutputException):
            int(borders.at[-1])
