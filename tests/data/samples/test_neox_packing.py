"""`data.samples.neox_packing`: samples against orders that GPT-NeoX's own code computed, and against plain loops."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import numbered

from openchatkit.data.batch import IGNORE
from openchatkit.data.samples.neox_packing import NeoxPacked, _fill_rows, pack_as_neox
from openchatkit.data.samples.source import MixtureSource
from openchatkit.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "neox_golden.json").read_text(encoding="utf-8"))["order"]
PADDING = 999_999
SIZES = [3, 0, 1, 17, 2, 8, 9, 10, 40, 7, 1, 0, 25, 16, 5, 5, 33, 64, 2, 11]


def read(packed: NeoxPacked, seq_length: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the first samples."""
    rows = []
    for sample in range(count):
        tokens, labels = np.full((2, seq_length), -7, np.int64)
        packed.fill(sample, tokens, labels)
        rows.append((tokens.tolist(), labels.tolist()))
    return rows


def as_row(window: list[int], seq_length: int, marks: list[int] | None = None) -> tuple[list[int], list[int]]:
    """A row and its labels of a window, which is cut or padded; `marks` say what is trained on."""
    trained = [token if mark else IGNORE for token, mark in zip(window, marks or [1] * len(window), strict=True)]
    window = (window + [PADDING] * (seq_length + 1))[: seq_length + 1]
    trained = (trained + [IGNORE] * (seq_length + 1))[: seq_length + 1]
    return window[:-1], trained[1:]


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{len(golden['sizes'])}-documents")
def test_windows_are_gpt_neox_s_own(make_source: Callable, golden: dict, in_memory: int) -> None:
    documents, length = numbered(golden["sizes"]), golden["seq_length"]
    # The number of a source among others decides nothing.
    source = make_source([documents], seed=golden["seed"], number=3, in_memory=in_memory)
    packed = pack_as_neox(
        source, length, packing="concat", wanted=golden["wanted"], padding=PADDING, allow_chopped=True
    )
    assert (packed.samples, packed.length, packed.passes) == (
        len(golden["shuffle"]),
        len(golden["shuffle"]) - 1,
        golden["epochs"],
    )
    expected = []
    for number in golden["shuffle"]:
        place, offset = golden["starts"][number]
        window = [token for document in golden["documents"][place:] for token in documents[document]]
        expected.append(as_row(window[offset : offset + length + 1], length))
    assert read(packed, length, packed.samples) == expected
    # What is beyond is taken from the beginning, of which GPT-NeoX counts one sample less than there are.
    assert read(packed, length, packed.samples + 2)[-2:] == [
        expected[(packed.samples + n) % packed.length] for n in (0, 1)
    ]


def test_one_pass_has_each_token_once(make_source: Callable) -> None:
    documents = numbered(SIZES)
    packed = pack_as_neox(
        make_source([documents[:9], documents[9:]]), 8, packing="concat", wanted=None, padding=0, allow_chopped=True
    )
    assert (packed.passes, packed.samples) == (1, (sum(SIZES) - 1) // 8)
    fed = [token for tokens, _ in read(packed, 8, packed.samples) for token in tokens]
    assert len(fed) == len(set(fed)) == 8 * packed.samples


def fill_until_overflow(
    sizes: list[int], seq_length: int, wanted: int, seed: int, usable: list[bool]
) -> tuple[list[int], list[list[int]]]:
    """GPT-NeoX's `pack_until_overflow`, document by document: the order of the rows, and each one's documents.

    The first document of the next row is each one's last. Its own last row is incomplete; here it is filled, too.
    """
    generator = np.random.RandomState(seed)
    order = np.arange(wanted)
    generator.shuffle(order)
    documents = np.arange(len(sizes))
    rows: list[list[int]] = []
    running = 0
    while len(rows) < wanted + 1:
        generator.shuffle(documents)
        for document in documents.tolist():
            if not usable[document]:
                continue
            if running == 0 or running + sizes[document] > seq_length + 1:
                rows.append([])
                running = 0
            rows[-1].append(document)
            running += sizes[document]
    return order.tolist(), [row + following[:1] for row, following in pairwise(rows[: wanted + 1])]


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("loss_on", ["all", "responses"])
@pytest.mark.parametrize("allow_chopped", [True, False])
@pytest.mark.parametrize("packing", ["overflow", "none"])
def test_rows_of_whole_documents(
    make_source: Callable, packing: str, allow_chopped: bool, loss_on: str, in_memory: int
) -> None:
    length, wanted, seed = 16, 45, 99
    documents, generator = numbered(SIZES), random.Random(1)
    masks = [[int(generator.random() < 0.15)] * len(document) for document in documents]
    masks[17] = [0] * 20 + [1] * 44  # nothing to train on before its row ends
    masked = loss_on == "responses"
    source = make_source(
        [documents[:7], documents[7:]], [masks[:7], masks[7:]], loss_on=loss_on, seed=seed, in_memory=in_memory
    )
    packed = pack_as_neox(source, length, packing=packing, wanted=wanted, padding=PADDING, allow_chopped=allow_chopped)
    assert (packed.samples, packed.length) == (wanted, wanted - 1)
    read_of = length + 1 if packing == "overflow" else length
    usable = [
        (allow_chopped or size <= length + 1) and (not masked or 1 in mask[:read_of])
        for size, mask in zip(SIZES, masks, strict=True)
    ]
    if packing == "overflow":
        order, rows = fill_until_overflow(SIZES, length, wanted, seed, usable)
    else:
        left = [number for number, fine in enumerate(usable) if fine]
        rows = [[left[row % len(left)], left[(row + 1) % len(left)]] for row in range(wanted)]
        order = list(range(wanted))
        np.random.RandomState(seed).shuffle(order)
    expected = []
    for number in order:
        *whole, next_one = rows[number]
        window = [token for document in whole for token in documents[document]] + documents[next_one][:1]
        marks = [mark for document in whole for mark in masks[document]] + masks[next_one][:1]
        expected.append(as_row(window, length, marks if masked else None))
    found = read(packed, length, wanted)
    assert found == expected
    fed = sum(token != PADDING for tokens, _ in found for token in tokens)
    assert packed.tokens_per_sample == pytest.approx(fed / wanted, abs=1.1 if packing == "none" else 0.2)
    assert packed.waste == 1 - packed.tokens_per_sample / length


def test_rows_kept_in_files_are_those_of_what_is_trained_on(make_source: Callable, tmp_path: Path) -> None:
    documents = numbered(SIZES)
    masks = [[number % 3 == 0] * len(document) for number, document in enumerate(documents)]

    def rows(loss_on: str, in_memory: int) -> list[tuple[list[int], list[int]]]:
        source = make_source([documents], [masks], loss_on=loss_on, cache_dir=tmp_path, in_memory=in_memory)
        return read(take(source, packing="overflow", wanted=9), 8, 9)

    assert [rows(loss_on, 0) for loss_on in ("all", "responses")] == [
        rows(loss_on, 1 << 20) for loss_on in ("all", "responses")
    ]


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=60), room=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_rows_begin_where_one_by_one_they_would(sizes: list[int], room: int) -> None:
    begins, running = [], 0
    for number, size in enumerate(sizes):
        if not begins or running == 0 or running + size > room:
            begins, running = [*begins, number], 0
        running += size
    assert _fill_rows(np.array(sizes), room).tolist() == begins


def test_rows_go_on_over_pieces_of_the_order(make_source: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source([numbered([1, 1, 2, 1, 0, 3, 1])])
    rows = read(take(source, packing="overflow", wanted=9), 8, 9)
    monkeypatch.setattr("openchatkit.data.samples.order.CHUNK", 2)
    assert read(take(source, packing="overflow", wanted=9), 8, 9) == rows


def take(source: MixtureSource, **options: object) -> NeoxPacked:
    return pack_as_neox(
        source, 8, **{"packing": "concat", "wanted": None, "padding": 0, "allow_chopped": True} | options
    )


def test_sources_without_a_sample_are_refused(make_source: Callable) -> None:
    with pytest.raises(UserError, match=r"^chats holds 8 tokens, too few for one sequence of 8 and the token after it"):
        take(make_source([numbered([3, 5])]))
    assert take(make_source([numbered([3, 5])]), wanted=4).passes == 5  # as in GPT-NeoX, a row then repeats them
    with pytest.raises(UserError, match=r"^chats holds 0 tokens"):
        take(make_source([[[], []]]), wanted=4)
    for packing in ("none", "overflow"):
        with pytest.raises(
            UserError, match=r"^chats: none of its 2 documents can be taken whole into a row of 8 tokens"
        ):
            take(make_source([numbered([10, 12])]), packing=packing, wanted=4, allow_chopped=False)
        with pytest.raises(UserError, match=r"^chats: none of its 2 documents can be taken"):
            take(make_source([[[], []]]), packing=packing, wanted=4)
