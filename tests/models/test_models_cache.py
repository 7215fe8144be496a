"""A key/value cache (models/cache.py) changes nothing: a stage fed in pieces computes what the whole forward does."""

import pytest
import torch
from test_parity import make, stages_of

TOKENS = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))
VARIANTS = [("gpt_neox", "pythia"), ("gpt_neox", "redpajama"), ("gpt_neox", "tied"), ("gptj", "gptj")]
exact = {"rtol": 0, "atol": 1e-12}


def stages(family_name, variant, *, cuts=()):
    model = make(family_name, variant).double().eval()
    return model, [stage.double() for stage in stages_of(model, cuts=cuts)]


@pytest.mark.parametrize(("family_name", "variant"), VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 13], [5, 1, 1, 6, 7]], ids=str)
@pytest.mark.parametrize("cuts", [(), (1,)], ids=["whole", "two stages"])
@torch.inference_mode()
def test_pieces_with_a_cache_give_the_logits_of_the_whole(family_name, variant, pieces, cuts):
    model, parts = stages(family_name, variant, cuts=cuts)
    caches = [stage.new_cache(3, 24) for stage in parts]
    logits = []
    for x in TOKENS.split(pieces, dim=1):
        for stage, cache in zip(parts, caches, strict=True):
            x = stage(x, cache=cache)
        logits.append(parts[-1].logits(x))
    whole = TOKENS
    for stage in parts:
        whole = stage(whole)
    found = torch.cat(logits, dim=1)
    torch.testing.assert_close(found, parts[-1].logits(whole), **exact)
    # transformers rounds the rotary table differently in its last bits.
    torch.testing.assert_close(found, model(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family_name", "variant"), VARIANTS)
@torch.inference_mode()
def test_a_stages_cache_holds_what_transformers_cache_does(family_name, variant):
    model, (stage,) = stages(family_name, variant)
    cache = stage.new_cache(3, 20)
    for piece in TOKENS.split([8, 12], dim=1):
        stage(piece, cache=cache)
    theirs = model(TOKENS, use_cache=True).past_key_values
    for ours, layer in zip(cache, theirs.layers, strict=True):
        torch.testing.assert_close(ours.content[0], layer.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.content[1], layer.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family_name", "variant"), VARIANTS)
@torch.inference_mode()
def test_rows_that_begin_at_different_places_are_read_as_each_by_itself(family_name, variant):
    """The second row's first six tokens are padding, each a document of its own."""
    _, (stage,) = stages(family_name, variant)
    begins = torch.tensor([[0], [6], [1]])
    place = torch.arange(20)
    document_starts = torch.where(place < begins, place, begins)
    cache, hidden = stage.new_cache(3, 20), []
    for piece in torch.arange(20).split([9, 1, 4, 6]):
        hidden.append(stage(TOKENS[:, piece], document_starts[:, piece], cache=cache))
    hidden = torch.cat(hidden, dim=1)
    for row, begin in enumerate(begins.flatten().tolist()):
        alone = stage(TOKENS[row : row + 1, begin:])[0]
        torch.testing.assert_close(hidden[row, begin:], alone, **exact)


@torch.inference_mode()
def test_a_mask_decides_what_is_seen_with_a_cache_as_without():
    _, (stage,) = stages("gpt_neox", "pythia")
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    torch.testing.assert_close(stage(TOKENS, mask=mask), stage(TOKENS), **exact)
    mask[12:, 3:6] = False
    whole, cache = stage(TOKENS, mask=mask), stage.new_cache(3, 20)
    first, rest = (stage(TOKENS[:, p], mask=mask[p, : p.stop], cache=cache) for p in (slice(0, 8), slice(8, 20)))
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, **exact)
    assert (whole - stage(TOKENS)).abs().max() > 1e-2


@torch.inference_mode()
def test_a_cache_has_the_dtype_of_the_computation_and_does_not_overflow():
    (stage,) = stages_of(make("gpt_neox", "pythia"))
    assert stage.new_cache(1, 4)[0].content.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cache = stage.new_cache(3, 19)
        assert cache[0].content.dtype == torch.bfloat16
        stage(TOKENS[:, :19], cache=cache)
        with pytest.raises(AssertionError, match="20 tokens in a cache for 19"):
            stage(TOKENS[:, 19:], cache=cache)
