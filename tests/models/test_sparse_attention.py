"""`models/sparse_attention.py`: the layouts of GPT-NeoX's own functions, and what tokens see by them."""

import json
from pathlib import Path

import pytest
import torch

from openchatkit.errors import UserError
from openchatkit.models.sparse_attention import block_mask, check_rows, make_layout
from openchatkit.models.sparsity import Sparsity, read_sparsity

LAYOUTS = json.loads((Path(__file__).parent / "neox_values.json").read_text(encoding="utf-8"))["layouts"]
CASES = {
    "local_4": ("local", {}),
    "local_32_of_40": ("local", {"num_local_blocks": 32}),
    "fixed": ("sparse_fixed", {}),
    "variable": ("sparse_variable", {}),
    "bigbird_no_random": ("bigbird", {"num_random_blocks": 0}),
    "bslongformer": ("bslongformer", {}),
}


def layout(kind, blocks, heads=1, layer=0, **settings):
    return make_layout(kind, read_sparsity(settings), blocks=blocks, heads=heads, layer=layer)


def rows(found):
    return ["".join(str(int(seen)) for seen in row) for row in found]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_gpt_neox(name):
    kind, settings = CASES[name]
    [found] = layout(kind, len(LAYOUTS[name]), **settings)
    assert rows(found) == LAYOUTS[name]


def test_windows_have_the_widths_that_are_listed_and_then_the_last_one():
    [found] = layout("sparse_variable", 7, local_window_blocks=[1, 2], global_block_indices=[])
    assert rows(found) == ["1000000", "0100000", "0110000", "0001000", "0001100", "0000010", "0000011"]


def test_global_blocks_may_be_ranges():
    [found] = layout(
        "bslongformer", 6, num_sliding_window_blocks=1, global_block_indices=[1, 4], global_block_end_indices=[3, 5]
    )
    assert rows(found) == ["100000", "110000", "111000", "011100", "111110", "011011"]


def test_each_head_may_have_other_global_blocks():
    found = layout(
        "sparse_fixed", 8, heads=3, different_layout_per_head=True, num_different_global_patterns=2, num_global_blocks=1
    )
    assert [rows(head)[-1] for head in found] == ["00011111", "00101111", "00011111"]


def test_the_global_blocks_of_a_short_last_window_may_begin_before_it():
    [found] = layout("sparse_fixed", 5, num_global_blocks=2)
    assert rows(found)[-1] == "00111"
    found = layout(
        "sparse_fixed", 5, heads=2, num_global_blocks=2, different_layout_per_head=True, num_different_global_patterns=2
    )
    assert [rows(head)[-1] for head in found] == ["00111", "11011"]


@pytest.mark.parametrize("kind", ["sparse_variable", "bigbird"])
def test_random_blocks_are_of_seed_layer_head_and_row(kind):
    settings = {"num_random_blocks": 2, "different_layout_per_head": True, "seed": 5}
    found = layout(kind, 40, heads=2, layer=3, **settings)
    plain = layout(kind, 40, **settings | {"num_random_blocks": 0, "different_layout_per_head": False})
    added = found & ~plain
    assert not added.triu(1).any()
    assert (added.sum(-1) <= 2).all()
    assert added[:, 20:].sum() > 40  # some are seen anyway
    assert torch.equal(layout(kind, 40, heads=2, layer=3, **settings), found)
    for other in ({"seed": 6}, {"layer": 4}):
        assert not torch.equal(layout(kind, 40, heads=2, **{"layer": 3, **settings, **other}), found)
    assert not torch.equal(found[0], found[1])
    # A row's own do not depend on rows after it.
    assert torch.equal(layout(kind, 17, heads=2, layer=3, **settings), found[:, :17, :17])


def test_random_blocks_are_all_as_likely():
    settings = {"num_random_blocks": 2, "local_window_blocks": [1], "global_block_indices": []}
    counts = sum(layout("sparse_variable", 9, layer=layer, **settings)[0, 8].int() for layer in range(900))
    assert counts[8] == 900  # its own
    assert all(150 < count < 250 for count in counts[:8].tolist())  # 200 each, by 12.5


def test_tokens_see_what_their_block_sees_and_none_later():
    found = layout("bigbird", 3, num_sliding_window_blocks=1, num_random_blocks=0)
    mask = block_mask(found, 2, 5, device=torch.device("cpu"))
    assert rows(mask[0]) == ["10000", "11000", "11100", "11110", "11001"]
    assert torch.equal(block_mask(found, 2, 2, before=3, device=torch.device("cpu")), mask[:, 3:])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("local", {"window": 4}, "sparsity_config: window is not known; the settings are block, "),
        ("local", {"block": 0}, "sparsity_config: block is 0, expected a whole number of at least 1"),
        ("local", {"num_local_blocks": 2.5}, "num_local_blocks is 2.5, expected a whole number of at least 1"),
        ("sparse_variable", {"local_window_blocks": []}, "local_window_blocks is [], expected at least one window"),
        ("local", {"different_layout_per_head": 1}, "different_layout_per_head is 1, expected true or false"),
        ("sparse_variable", {"local_window_blocks": 4}, "expected a list of whole numbers of at least 1"),
        ("bslongformer", {"global_block_end_indices": [0]}, "expected a list of whole numbers of at least 1"),
        (
            "bslongformer",
            {"global_block_indices": [3], "global_block_end_indices": [3]},
            "global_block_end_indices is [3], expected an end, exclusive, after each of global_block_indices",
        ),
        ("sparse_fixed", {"num_global_blocks": 3}, "num_global_blocks is 3, expected a divisor of num_local_blocks 4"),
        (
            "sparse_fixed",
            {"num_different_global_patterns": 2},
            "num_different_global_patterns is 2, expected 1 unless different_layout_per_head is true",
        ),
        (
            "sparse_fixed",
            {"num_different_global_patterns": 5, "different_layout_per_head": True},
            "num_different_global_patterns is 5, expected at most num_local_blocks / num_global_blocks = 4",
        ),
    ],
)
def test_settings_that_make_no_layout_are_refused(kind, settings, message):
    with pytest.raises(UserError) as error:
        layout(kind, 8, **settings)
    assert message in str(error.value)


def test_rows_that_are_not_whole_blocks_are_refused():
    check_rows(Sparsity(), 64)
    with pytest.raises(UserError, match=r"--seq-length 70: blocks of .* have 16 tokens; use 64, or"):
        check_rows(Sparsity(), 70)
