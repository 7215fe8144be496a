"""`data.neox_order`: data sets in GPT-NeoX's order, of one store and of weighted ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from openchatkit.data import neox_order
from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.options import DataOptions, from_settings
from openchatkit.data.samples.arrays import Arrays
from openchatkit.errors import UserError
from openchatkit.formats.store_writer import TokenStoreWriter


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., str]:
    """Write a store of so many documents of 9 tokens each, which count up from `first` and end with end-of-text."""

    def store(name: str, documents: int, first: int = 2) -> str:
        tokens = np.arange(first, first + 9 * documents).reshape(documents, 9)
        tokens[:, -1] = 0
        with TokenStoreWriter(tmp_path / name, vocab_size=300, masked=False) as writer:
            writer.add(tokens.ravel(), np.full(documents, 9))
        return str(tmp_path / name)

    return store


@pytest.fixture
def build(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Dataset]:
    def build(task_names: str, **options: object) -> Dataset:
        chosen = {"seq_length": 8, "seed": 1, "data_cache": tmp_path / "cache", "data_order": "neox"} | options
        return build_dataset(task_names, DataOptions(tiny_tokenizer, **chosen))

    return build


def window(store: range, documents: list[int], number: int) -> list[int]:
    """Window `number` of 9 tokens, at a stride of 8, in the documents of 9 tokens of `store`, in this order."""
    stream = [0 if token % 9 == 8 else store[token] for at in documents for token in range(9 * at, 9 * at + 9)]
    return stream[8 * number : 8 * number + 9]


def orders(documents: int, passes: int, seed: int = 1) -> tuple[list[int], list[int]]:
    """GPT-NeoX's order of documents of 9 tokens in so many passes, and of windows of 9 tokens in them."""
    generator = np.random.RandomState(seed)
    numbers = np.tile(np.arange(documents, dtype=np.int32), passes)
    generator.shuffle(numbers)
    windows = np.arange((9 * documents * passes - 1) // 8, dtype=np.uint32)
    generator.shuffle(windows)
    return numbers.tolist(), windows.tolist()


def test_one_store(build: Callable, store: Callable) -> None:
    name = store("a", 20)
    data = build(name, wanted=40, rows=4)  # 22 windows a pass, so two of them: 44 windows
    numbers, windows = orders(20, 2)
    assert len(windows) == 44
    batch = data.batch(0, 40)
    expected = [window(range(2, 182), numbers, windows[n]) for n in range(40)]
    assert batch.tokens.tolist() == [row[:-1] for row in expected]
    assert batch.labels.tolist() == [row[1:] for row in expected]
    # GPT-NeoX counts one window less than there are, takes whole steps of them, and begins again.
    assert data.epoch_samples == 40
    assert torch.equal(data.batch(40, 3).tokens, batch.tokens[:3])
    assert data.epochs(22) == [1.0]
    last = build(name, wanted=44, rows=4)
    assert last.batch(40, 4).tokens.tolist() == last.batch(0, 4).tokens.tolist()
    assert build(name, wanted=22, rows=22).batch(0, 22).rows == 22  # the only step is complete


def test_one_pass_that_repeats(build: Callable, store: Callable) -> None:
    name = store("a", 20)
    data = build(name, rows=5)
    numbers, windows = orders(20, 1)
    assert (len(windows), data.epoch_samples) == (22, 20)
    expected = [window(range(2, 182), numbers, windows[n])[:-1] for n in range(20)]
    assert data.batch(0, 40).tokens.tolist() == expected * 2
    with pytest.raises(UserError, match=r"a: 22 rows of 8 tokens are fewer than the 23 of a step: add data, or give"):
        build(name, rows=23)


@pytest.mark.parametrize("in_files", [False, True])
def test_blended_stores(build: Callable, store: Callable, monkeypatch: pytest.MonkeyPatch, in_files: bool) -> None:
    if in_files:
        monkeypatch.setattr(neox_order, "Arrays", lambda folder, size: Arrays(folder, size, in_memory=0))
    data = build(f"{store('a', 20)}:1,{store('b', 10, 100)}:3", wanted=60, rows=4)
    # ceil(60 x 0.25 x 1.005) and ceil(60 x 0.75 x 1.005) samples, in passes of 22 and 11 windows
    parts = [orders(20, 1), orders(10, 5)]
    assert [len(windows) for _, windows in parts] == [22, 56]
    tokens, given = data.batch(0, 60), [0, 0]
    for n in range(60):
        behind = [0.25 * max(n, 1) - given[0], 0.75 * max(n, 1) - given[1]]
        source = 0 if behind[0] >= behind[1] else 1
        assert data.interleaving.locate(n) == (source, given[source])
        numbers, windows = parts[source]
        expected = window((range(2, 182), range(100, 190))[source], numbers, windows[given[source]])
        assert (tokens.tokens[n].tolist(), int(tokens.sources[n])) == (expected[:-1], source)
        given[source] += 1
    assert data.interleaving.counts(60) == given == [15, 45]


def test_a_list_of_one_store_has_more_than_it_wants(build: Callable, store: Callable) -> None:
    name = store("a", 20)
    assert build(name, wanted=22).packed[0].passes == 1
    assert build(f"{name}:7", wanted=22).packed[0].passes == 2  # ceil(22 x 1.005) are more than one pass has


def test_more_steps_are_the_same_data_while_they_need_no_further_pass(build: Callable, store: Callable) -> None:
    name = store("a", 20)
    first = build(name, wanted=24).fingerprint
    assert first == build(name, wanted=44).fingerprint == build(name, wanted=24, rows=2).fingerprint
    others = [
        build(name, wanted=45),
        build(name, wanted=24, seed=2),
        build(name, wanted=24, mask_end_of_text=True),
        build(name, data_order="kit"),
        build(name, wanted=24, packing="none"),
    ]
    assert len({first, *(data.fingerprint for data in others)}) == 6


@pytest.mark.parametrize("order", ["kit", "neox"])
def test_nothing_is_predicted_from_the_end_of_a_document(build: Callable, store: Callable, order: str) -> None:
    name = store("a", 20)
    batch, masked = (build(name, wanted=40, data_order=order, mask_end_of_text=on).batch(0, 40) for on in (False, True))
    assert torch.equal(masked.tokens, batch.tokens)
    assert torch.equal(masked.labels, torch.where(batch.tokens == 0, IGNORE, batch.labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data_order": "kit", "packing": "overflow"},
            "--packing overflow is of GPT-NeoX's order: give --data-order neo",
        ),
        (
            {"data_order": "kit", "allow_chopped": False},
            "--allow-chopped false is of GPT-NeoX's order: give --data-order",
        ),
        ({"packing": "documents"}, "--data-order neox and --packing documents exclude each other: use --packing over"),
        ({"mixture_unit": "tokens"}, "--data-order neox and --mixture-unit tokens exclude each other: weights are"),
        (
            {"packing": "none"},
            "--data-order neox and --nepochs exclude each other: give --total-steps, or --packing con",
        ),
        ({"seed": 1 << 32}, "--seed 4294967296: --data-order neox takes one below 4294967296"),
    ],
)
def test_what_an_order_does_not_go_with(build: Callable, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("nothing", **options)


def test_a_checkpoint_says_how_many_samples_its_run_takes() -> None:
    settings = {"tokenizer_name": "t", "data_cache": "c", "batch_size": 6, "data_group_size": 2}
    steps = from_settings(settings | {"total_steps": 5, "nepochs": None, "gradient_accumulate_step": 3})
    assert (steps.wanted, steps.rows) == (180, 36)
    assert from_settings(settings | {"total_steps": None, "nepochs": 2}).wanted is None
