"""Parts of a model (models/cuts.py): what they have, what they start with, and that they join to the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import make, variants
from torch import nn

from openchatkit.errors import UserError
from openchatkit.models import gpt_neox, gptj
from openchatkit.models.cuts import WHOLE, Part, check_parts, cut_shard, cut_tensor, join_shard, whole_shape
from openchatkit.models.layers import VocabularyRows
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.stage import Stage

SERIAL_AND_TIED = {"use_parallel_residual": False, "tie_word_embeddings": True}
CASES = [("gpt_neox", "pythia", {}), ("gpt_neox", "no_bias", SERIAL_AND_TIED), ("gptj", "gptj", {})]
COUNTS = [1, 2, 4]


def config_of(family_name, variant, changes=None):
    return config_from_hf({**make(family_name, variant).config.to_dict(), **(changes or {})})


def parts(count):
    return [Part(index, count) for index in range(count)]


def tensors_of(stage):
    return {shard: dict(module.state_dict()) for shard, module in stage.named_shards()}


def test_every_parameter_says_how_it_is_cut():
    found = {name: set() for name in ("gpt_neox", "gptj")}
    for case in variants():
        config = config_of(*case)
        for _, module in Stage(config).named_shards():
            found[config.family] |= {name for name, _ in module.named_parameters()}
    assert found == {"gpt_neox": set(gpt_neox.CUTS), "gptj": set(gptj.CUTS)}


@pytest.mark.parametrize(("family_name", "variant"), variants())
@pytest.mark.parametrize("count", COUNTS)
def test_a_part_has_its_cut_of_every_parameter(family_name, variant, count):
    config = config_of(family_name, variant)
    cuts = family(config).cuts(config)
    with torch.device("meta"):
        whole, *stages = [Stage(config, part=part) for part in (WHOLE, *parts(count))]
    for shard, tensors in tensors_of(whole).items():
        for stage in stages:
            expected = {name: t.shape for name, t in cut_shard(tensors, cuts, stage.part).items()}
            found = {name: t.shape for name, t in tensors_of(stage)[shard].items()}
            assert found == expected
            for name, shape in found.items():
                assert whole_shape(shape, cuts[name], count) == tuple(tensors[name].shape)


@pytest.mark.parametrize(("family_name", "variant", "changes"), CASES)
@pytest.mark.parametrize("count", COUNTS)
def test_a_new_model_is_the_same_in_parts(family_name, variant, changes, count):
    config = config_of(family_name, variant, changes)
    cuts, found = family(config).cuts(config), []
    for part in (WHOLE, *parts(count)):
        stage = Stage(config, part=part)
        stage.init_weights(7)
        found.append(tensors_of(stage))
    whole, *pieces = found
    for shard, tensors in whole.items():
        joined = join_shard([piece[shard] for piece in pieces], cuts)
        assert joined.keys() == tensors.keys()
        assert all(torch.equal(joined[name], tensors[name]) for name in tensors)
        for part, piece in zip(parts(count), pieces, strict=True):
            expected = cut_shard(tensors, cuts, part)
            assert expected.keys() == piece[shard].keys()
            assert all(torch.equal(piece[shard][name], expected[name]) for name in expected)
    if config.tie_embeddings:
        names = family(config).embedding_weight, family(config).tied_weight
        assert all(torch.equal(piece[EMBED][names[0]], piece[HEAD][names[1]]) for piece in pieces)


@given(
    cut=st.sampled_from(["rows", "columns", "whole", "once"]),
    count=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    transposed=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_joining_inverts_cutting(cut, count, sizes, transposed):
    if cut == "columns" and len(sizes) == 1:
        sizes = [1, *sizes]
    shape = whole_shape(sizes, cut, count)
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    if transposed:
        whole = whole.transpose(0, -1).contiguous().transpose(0, -1)
    pieces = [cut_shard({"x": whole}, {"x": cut}, part) for part in parts(count)]
    assert [list(piece["x"].shape) for piece in pieces if piece] == [sizes] * (1 if cut == "once" else count)
    joined = join_shard(pieces, {"x": cut})
    assert joined.keys() == {"x"}
    assert torch.equal(joined["x"], whole)


@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_a_piece_does_not_keep_the_whole_in_memory(cut):
    whole = torch.zeros(8, 8)
    piece = cut_tensor(whole, cut, Part(1, 4))
    assert piece.is_contiguous()
    assert piece.untyped_storage().nbytes() == whole.untyped_storage().nbytes() // 4
    assert cut_tensor(whole, cut, WHOLE) is whole


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_that_divide_the_model(count):
    check_parts(config_of("gpt_neox", "pythia"), count)


@pytest.mark.parametrize(
    ("count", "changes", "fitting"),
    [
        (3, {}, "1 or 2 or 4"),
        (8, {}, "1 or 2 or 4"),  # more than its heads
        (0, {}, "1 or 2 or 4"),
        (4, {"num_attention_heads": 2}, "1 or 2"),
        (4, {"intermediate_size": 82}, "1 or 2"),
        (2, {"vocab_size": 97}, "1"),
    ],
)
def test_parts_that_do_not_divide_the_model(count, changes, fitting):
    sizes = {"num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 96, **changes}
    with pytest.raises(UserError) as raised:
        check_parts(config_of("gpt_neox", "pythia", changes), count)
    assert str(raised.value) == (
        f"--tensor-group-size {count}: expected a number that divides all of the model's sizes (attention heads "
        f"{sizes['num_attention_heads']}, intermediate size {sizes['intermediate_size']}, vocabulary rows "
        f"{sizes['vocab_size']}); give {fitting}"
    )


def test_a_part_beyond_the_last_and_a_size_that_does_not_divide():
    with pytest.raises(AssertionError, match="part 2 of 2"):
        Part(2, 2)
    with pytest.raises(AssertionError, match="5 in 2 parts"):
        Part(0, 2).share(5)
    assert [part.first(12) for part in parts(3)] == [0, 4, 8]


def test_embeddings_of_parts_add_up_and_their_gradients_join():
    config = config_of("gpt_neox", "pythia")
    tokens = torch.tensor([[0, 23, 24, 47, 48, 95, 95, 71]])
    whole, *pieces = [VocabularyRows(config, part) for part in (WHOLE, *parts(4))]
    for part, piece in zip(parts(4), pieces, strict=True):
        piece.weight.data = cut_tensor(whole.weight.data, "rows", part)
    weight = torch.randn(1, 8, config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = [piece(tokens) for piece in pieces]
    assert torch.equal(torch.stack(found).sum(0), whole(tokens))
    for each in (whole(tokens), *found):
        (each * weight).sum().backward()
    assert torch.equal(torch.cat([piece.weight.grad for piece in pieces]), whole.weight.grad)


@pytest.mark.parametrize(("family_name", "variant", "changes"), CASES)
def test_seams_are_put_where_the_parts_meet(family_name, variant, changes):
    """Each is called once a layer with parallel residual, twice with serial, and once in the embedding or the head."""
    calls = []

    class Seam(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    config = config_of(family_name, variant, changes)
    stage = Stage(config)
    tokens = torch.arange(12).unsqueeze(0)
    expected = stage(tokens)
    names = list(stage.state_dict())
    stage.connect_parts(Seam("enter"), Seam("leave"))
    assert torch.equal(stage(tokens), expected)
    pairs = config.num_layers * (1 if config.parallel_residual else 2)
    assert calls == ["leave", *["enter", "leave"] * pairs, "enter"]
    assert list(stage.state_dict()) == names


def test_a_parts_cache_has_its_heads():
    stage = Stage(config_of("gpt_neox", "pythia"), part=Part(1, 4))
    assert stage.new_cache(2, 5)[0].content.shape == (2, 2, 1, 5, 16)
