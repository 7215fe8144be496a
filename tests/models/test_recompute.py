"""`models/recompute.py`: the same bits, and what layers keep for their backward pass."""

import weakref
from collections import Counter

import pytest
import torch
from model_configs import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

from openchatkit.models.registry import config_from_hf
from openchatkit.models.stage import Stage

LAYERS = FAMILIES["neox"]["num_hidden_layers"]


class Operators(TorchDispatchMode):
    """Counts products by the width of their result, and calls of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.counts[f"product {result.shape[1]}"] += 1
        elif name.startswith("_scaled_dot_product") and "backward" not in name:
            self.counts["attention"] += 1
        return result


def gradients(kind: str, *, documents: bool, **options: bool) -> tuple[list[torch.Tensor], Counter, Counter]:
    """Gradients of a fixed batch, and the operators of the forward and of the backward pass."""
    stage = Stage(config_from_hf(FAMILIES[kind]), **options)
    stage.init_weights(0)
    tokens = torch.arange(48).reshape(2, 24) % 64
    starts = torch.tensor([[0] * 10 + [10] * 14, [0] * 24]) if documents else None
    with Operators() as forward:
        loss = stage.logits(stage(tokens, starts)).square().mean()
    with Operators() as backward:
        loss.backward()
    return [parameter.grad for parameter in stage.parameters()], forward.counts, backward.counts


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputed_layers_have_the_same_gradients(kind, documents):
    plain, forward, backward = gradients(kind, documents=documents)
    full, full_forward, full_backward = gradients(kind, documents=documents, recompute=True)
    selective, selective_forward, selective_backward = gradients(
        kind, documents=documents, recompute=True, selective=True
    )
    for other in (full, selective):
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
    assert forward == full_forward == selective_forward
    # Full: attention and the products before the last again, once a layer. Selective: the wide products alone.
    wide = ("product 96", "product 128") if kind == "neox" else ("product 128",)
    assert full_backward["attention"] == LAYERS
    assert selective_backward["attention"] == 0
    for width in wide:
        assert full_backward[width] - backward[width] == selective_backward[width] - backward[width] == LAYERS
    assert full_backward["product 32"] > selective_backward["product 32"] == backward["product 32"]


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_offloaded_inputs_are_kept_as_copies_in_main_memory(kind, selective):
    """Of each layer's input a copy is kept, from which the same gradients come, and the input itself is freed."""
    found = {}
    for offload in (False, True):
        stage = Stage(config_from_hf(FAMILIES[kind]), recompute=True, selective=selective, offload=offload)
        stage.init_weights(0)
        inputs = []
        for name, layer in stage.shards.items():
            if name.startswith("layer"):
                layer.register_forward_pre_hook(lambda _, given, into=inputs: into.append(weakref.ref(given[0])))
        loss = stage.logits(stage(torch.arange(48).reshape(2, 24) % 64)).square().mean()
        alive = sum(reference() is not None for reference in inputs)
        loss.backward()
        found[offload] = alive, [parameter.grad for parameter in stage.parameters()]
    assert (found[False][0], found[True][0]) == (LAYERS, 0)
    assert all(torch.equal(one, two) for one, two in zip(found[False][1], found[True][1], strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_layers_run_one_compiled_program(kind):
    """Without a break, and with the results of layers that are not compiled."""
    programs = []

    def keep(module: torch.fx.GraphModule, _: object) -> object:
        programs.append(module)
        return module.forward

    tokens = torch.arange(48).reshape(2, 24) % 64
    starts = torch.tensor([[0] * 10 + [10] * 14, [0] * 24])
    stage = Stage(config_from_hf(FAMILIES[kind]))
    stage.init_weights(0)
    plain = stage(tokens, starts)
    torch.compiler.reset()
    stage.compile_layers(keep)
    assert torch.equal(stage(tokens, starts), plain)
    assert len(programs) == 1


def test_compiled_layers_take_rows_of_any_length():
    stage = Stage(config_from_hf(FAMILIES["neox"]))
    stage.init_weights(0)
    rows = [torch.arange(2 * length).reshape(2, length) % 64 for length in (24, 16, 9)]
    plain = [stage(row) for row in rows]
    torch.compiler.reset()
    stage.compile_layers("aot_eager")
    for row, expected in zip(rows, plain, strict=True):
        assert torch.equal(stage(row), expected)
