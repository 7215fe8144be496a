"""A model in parts over gloo against the same model in one process: loss, gradients, and how often ranks meet."""

import itertools
from functools import partial

import gloo_ranks
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from openchatkit.distributed.seams import Enter, Leave
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import WHOLE, Part, cut_shard, join_tensor
from openchatkit.models.neox_options import NeoxOptions
from openchatkit.models.registry import family
from openchatkit.models.stage import Stage
from openchatkit.training.loss import VocabularyLoss

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "rotary_dim": 4,
    "rotary_base": 10000.0,
    "activation": "gelu",
    "norm_eps": 1e-5,
    "parallel_residual": True,
    "attention_bias": True,
    "tie_embeddings": False,
    "init_std": 0.2,
}
NETWORKS = {
    "parallel": {"family": "gpt_neox"},
    "serial": {"family": "gpt_neox", "parallel_residual": False},
    "tied": {"family": "gpt_neox", "tie_embeddings": True},
    "serial, tied, no bias": {
        "family": "gpt_neox",
        "parallel_residual": False,
        "tie_embeddings": True,
        "attention_bias": False,
    },
    "gptj": {"family": "gptj", "attention_bias": False},
    "grouped, gated": {
        "family": "neox",
        "num_heads": 8,
        "activation": "swiglu",
        "options": NeoxOptions(norm="rmsnorm", num_kv_heads=4, gpt_j_tied=True),
    },
    "learned positions": {"family": "neox", "rotary_dim": 0, "options": NeoxOptions(pos_emb="learned")},
    "serial, one number a norm": {
        "family": "neox",
        "parallel_residual": False,
        "options": NeoxOptions(norm="scalenorm", use_qk_layernorm=True),
    },
}
CASES = [
    (network, documents, recompute)
    for network, documents, recompute in itertools.product(NETWORKS, [False, True], [False, True])
]
HALVES = list(itertools.product(["parallel", "serial", "gptj", "grouped, gated"], [torch.bfloat16, torch.float16]))
ROWS, LENGTH, CHUNK = 3, 12, 16
COUNTS = [2, 4]


def config_of(network):
    return ModelConfig(**{**SIZES, **NETWORKS[network]})


def make_stage(network, part, **options):
    """A part of a float64 model with random weights, biases and norms too."""
    config = config_of(network)
    whole = Stage(config, **options).double()
    whole.init_weights(3)
    generator = torch.Generator().manual_seed(5)
    stage = Stage(config, part=part, **options).double()
    embedding = None
    for shard, module in whole.named_shards():
        tensors = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in module.state_dict().items()
        }
        if config.tie_embeddings and shard == "head":
            tensors[family(config).tied_weight] = embedding
        embedding = tensors.get(family(config).embedding_weight, embedding)
        stage.load(shard, cut_shard(tensors, family(config).cuts(config), part))
    if part.count > 1:
        stage.connect_parts(Enter(dist.group.WORLD), Leave(dist.group.WORLD))
    return stage


def batch(*, ignored=0.2, seed=1):
    """Tokens, document starts, labels and sources; the labels at the borders of parts are among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, 40, (ROWS, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
    tokens[0, :8] = labels[0, :8] = torch.tensor([0, 9, 10, 19, 20, 29, 30, 39])
    starts = torch.arange(LENGTH).repeat(ROWS, 1)
    starts[0], starts[1, :5], starts[1, 5:] = 0, 0, 5
    return tokens, starts, labels, torch.tensor([[0], [2], [0]]).expand_as(labels)


class Counted:
    """The all-reduces of this process, by the phase in which they are called."""

    def __init__(self):
        self.phase, self.numbers, self._all_reduce = (
            "forward",
            {"forward": 0, "loss": 0, "backward": 0},
            dist.all_reduce,
        )

    def __enter__(self):
        dist.all_reduce = self
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._all_reduce

    def __call__(self, *args, **kwargs):
        self.numbers[self.phase] += 1
        return self._all_reduce(*args, **kwargs)


def gradients_of(stage):
    return {f"{s}/{n}": p.grad for s, module in stage.named_shards() for n, p in module.named_parameters()}


def run_case(network, documents, recompute, part):
    """Loss, losses by source, gradients of the parameters and the numbers of all-reduces of a part."""
    stage = make_stage(network, part, recompute=recompute)
    tokens, starts, labels, sources = batch()
    group = dist.group.WORLD if part.count > 1 else None
    loss = VocabularyLoss(stage.projection, group=group, first=part.first(SIZES["vocab_size"]), chunk_tokens=CHUNK)
    sums = torch.zeros(3, dtype=torch.float64)
    with Counted() as counted:
        hidden = stage(tokens, starts if documents else None)
        counted.phase = "loss"
        total = loss(hidden, labels, scale=0.25, sources=sources, sums=sums)
        counted.phase = "backward"
        total.backward()
    with torch.no_grad():
        evaluated = loss(stage(tokens, starts if documents else None), labels, scale=0.25)
    return {
        "loss": total.detach(),
        "evaluated": evaluated,
        "sums": sums,
        "gradients": gradients_of(stage),
        "counts": torch.tensor(list(counted.numbers.values())),
    }


def run_half(network, dtype, part):
    """Gradients of a float32 model whose products and sums over parts are in half precision."""
    stage = make_stage(network, part).float()
    tokens, starts, labels, _ = batch()
    group = dist.group.WORLD if part.count > 1 else None
    loss = VocabularyLoss(stage.projection, group=group, first=part.first(SIZES["vocab_size"]), chunk_tokens=CHUNK)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = loss(stage(tokens, starts), labels, scale=64.0)
    total.backward()
    return {"loss": total.detach(), "gradients": gradients_of(stage)}


def run_split(network, recompute, part):
    """Gradients of a middle stage whose backward is split as torch's zero bubble does, and of a usual backward."""
    found = []
    for split in (False, True):
        stage = make_stage(network, part, embed=False, head=False, recompute=recompute)
        generator = torch.Generator().manual_seed(2)
        x, gradient = torch.randn(2, ROWS, LENGTH, SIZES["hidden_size"], dtype=torch.float64, generator=generator)
        x.requires_grad_()
        hidden = stage(x)
        if split:
            (by_input,), groups = stage_backward_input([hidden], [gradient], [x], stage.parameters())
            stage_backward_weight(stage.parameters(), groups)
        else:
            hidden.backward(gradient)
            by_input = x.grad
        found.append([by_input, *(p.grad for p in stage.parameters())])
    return found


def run_ranks(count, rank):
    part = Part(rank, count)
    return {
        "cases": [run_case(*case, part) for case in CASES],
        "halves": [run_half(*case, part) for case in HALVES],
        "split": [run_split(network, recompute, part) for network in NETWORKS for recompute in (False, True)],
    }


@pytest.fixture(scope="module", params=COUNTS)
def found(request, tmp_path_factory):
    return gloo_ranks.run(partial(run_ranks, request.param), request.param, tmp_path_factory.mktemp("parts"))


def joined_gradients(network, results):
    """The whole's gradients: pieces joined, shares added."""
    cuts, gradients = family(config_of(network)).cuts(config_of(network)), [result["gradients"] for result in results]
    whole = {}
    for key in gradients[0]:
        pieces, cut = [each[key] for each in gradients if key in each], cuts[key.partition("/")[2]]
        whole[key] = sum(pieces) if cut == "whole" else join_tensor(pieces, cut)
    return whole


def test_loss_and_gradients_are_those_of_one_process(found):
    for number, case in enumerate(CASES):
        results = [each["cases"][number] for each in found]
        expected = run_case(*case, WHOLE)
        for result in results:
            assert all(torch.equal(result[name], results[0][name]) for name in ("loss", "evaluated", "sums")), case
        assert torch.allclose(results[0]["loss"], expected["loss"], rtol=1e-6, atol=0), case
        assert torch.allclose(results[0]["evaluated"], expected["loss"], rtol=1e-6, atol=0), case
        assert torch.allclose(results[0]["sums"], expected["sums"], rtol=1e-6, atol=0), case
        assert expected["sums"].tolist()[1] == 0
        gradients = joined_gradients(case[0], results)
        assert gradients.keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), (case, name)


def test_half_precision_is_as_exact_as_in_one_process(found):
    for number, (network, dtype) in enumerate(HALVES):
        results = [each["halves"][number] for each in found]
        assert all(torch.equal(result["loss"], results[0]["loss"]) for result in results)
        exact, whole = (run_half(network, each, WHOLE) for each in (torch.float32, dtype))
        assert abs(results[0]["loss"] - exact["loss"]) <= 1e-2 * exact["loss"]
        for name, gradient in joined_gradients(network, results).items():
            theirs, expected = whole["gradients"][name], exact["gradients"][name]
            error, usual = ((each - expected).norm() / expected.norm() for each in (gradient, theirs))
            assert error <= 2 * usual + 1e-3, (network, dtype, name)


def test_ranks_meet_as_seldom_as_the_network_allows(found):
    """Once a layer each way with parallel residual, twice with serial; no layer's last sum is computed again."""
    chunks = -(-int((batch()[2] != -100).sum()) // CHUNK)
    for number, (network, _, recompute) in enumerate(CASES):
        config = config_of(network)
        pairs = config.num_layers * (1 if config.parallel_residual else 2)
        again = config.num_layers if recompute and not config.parallel_residual else 0
        for each in found:
            assert each["cases"][number]["counts"].tolist() == [1 + pairs, 2 * chunks, pairs + 1 + again]


def test_a_backward_in_two_halves_gives_the_same_bits(found):
    for each in found:
        for usual, split in each["split"]:
            assert all(torch.equal(a, b) for a, b in zip(usual, split, strict=True))
