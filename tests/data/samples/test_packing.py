"""`data.samples.packing`: samples of each packing against a plain reading of the documents."""

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import numbered

from openchatkit.data.batch import IGNORE
from openchatkit.data.samples import order
from openchatkit.data.samples.packing import Packed, pack
from openchatkit.data.samples.source import Content, MixtureSource
from openchatkit.errors import UserError
from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.formats.token_store import TokenStore

PADDING = 999_999
SIZES = [3, 0, 1, 17, 2, 8, 9, 10, 40, 7, 1, 0, 25, 16, 5, 5, 33, 64, 2, 11]


def read(packed: Packed, seq_length: int, first: int, count: int, *, document_starts: bool = True) -> list[np.ndarray]:
    """tokens, labels and document_starts of some samples."""
    arrays = [np.full((count, seq_length), -7, np.int64) for _ in range(3)]
    for row in range(count):
        packed.fill(first + row, arrays[0][row], arrays[1][row], arrays[2][row] if document_starts else None)
    return arrays


def split(values: list, parts: int) -> list[list]:
    """The values as some lists one after another, the middle one empty when there are three."""
    if parts == 3:
        return [values[: len(values) // 3], [], values[len(values) // 3 :]]
    return [values]


def random_masks(documents: list[list[int]], seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randint(0, 1) for _ in document] for document in documents]


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("loss_on", ["all", "responses"])
@pytest.mark.parametrize("seq_length", [1, 8, 50])
def test_concatenated(make_source: Callable, loss_on: str, parts: int, in_memory: int, seq_length: int) -> None:
    documents = numbered(SIZES)
    masks = random_masks(documents)
    source = make_source(split(documents, parts), split(masks, parts), loss_on=loss_on, in_memory=in_memory)
    packed = pack(source, seq_length, packing="concat", padding=PADDING)
    total = sum(SIZES)
    assert (packed.samples, packed.tokens_per_sample, packed.waste) == (-(-total // seq_length), seq_length, 0)
    count = 3 * total // seq_length
    tokens, labels, _ = read(packed, seq_length, 0, count, document_starts=False)
    order = [number for epoch in range(5) for number in source.order(epoch)]
    stream = np.array([token for number in order for token in documents[number]])
    trained = np.array([mark for number in order for mark in masks[number]]) == 1
    rows = np.arange(count * seq_length)
    assert np.array_equal(tokens.ravel(), stream[rows])
    expected = stream if loss_on == "all" else np.where(trained, stream, IGNORE)
    assert np.array_equal(labels.ravel(), expected[rows + 1])


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_one_document_a_row(make_source: Callable, loss_on: str, parts: int, in_memory: int) -> None:
    documents = numbered(SIZES)
    masks = random_masks(documents)
    source = make_source(split(documents, parts), split(masks, parts), loss_on=loss_on, in_memory=in_memory)
    packed = pack(source, 16, packing="none", padding=PADDING)
    assert packed.samples == len(SIZES)
    tokens, labels, _ = read(packed, 16, 0, 2 * len(SIZES), document_starts=False)
    for epoch in range(2):
        for row, number in enumerate(source.order(epoch), epoch * len(SIZES)):
            marks = masks[number] if loss_on == "responses" else [1] * len(documents[number])
            document, marks = documents[number][:17], marks[:17]
            padded = document + [PADDING] * (17 - len(document))
            assert tokens[row].tolist() == padded[:-1]
            kept = [token if mark else IGNORE for token, mark in zip(document, marks, strict=True)]
            assert labels[row].tolist() == (kept + [IGNORE] * 17)[1:17]
    assert packed.waste == pytest.approx((tokens == PADDING).mean())
    assert packed.tokens_per_sample == pytest.approx((tokens != PADDING).sum(axis=1).mean())


def check_documents(
    source: MixtureSource, documents: list[list[int]], masks: list[list[int]] | None, seq_length: int
) -> list:
    """Three epochs: what is fed, what is predicted, where documents begin. Returns the rows of tokens of each."""
    packed = pack(source, seq_length, packing="documents", padding=PADDING)
    predicted = Counter(token for document in documents for token in document[1:])
    trained = predicted
    if masks:
        pairs = (zip(*pair, strict=True) for pair in zip(documents, masks, strict=True))
        trained = Counter(token for pair in pairs for token, mark in list(pair)[1:] if mark)
    fed = Counter(token for document in documents for token in document[:-1])
    follows = {first: second for document in documents for first, second in pairwise(document)}
    epochs = []
    for epoch in range(3):
        tokens, labels, starts = read(packed, seq_length, epoch * packed.samples, packed.samples)
        real = tokens != PADDING
        assert Counter(tokens[real].tolist()) == fed
        assert Counter(labels[labels != IGNORE].tolist()) == trained
        assert packed.waste == pytest.approx(1 - real.mean(), abs=1e-12)
        assert packed.tokens_per_sample == pytest.approx(real.sum(axis=1).mean())
        for row, row_labels, row_starts in zip(tokens.tolist(), labels.tolist(), starts.tolist(), strict=True):
            size = sum(token != PADDING for token in row)
            assert row[size:] == [PADDING] * (seq_length - size)
            assert row_starts[size:] == list(range(size, seq_length))
            assert row_labels[size:] == [IGNORE] * (seq_length - size)
            begins = [t for t in range(size) if row_starts[t] == t]
            assert all(row_starts[t] in (t, row_starts[t - 1]) for t in range(1, size))
            assert not size or begins[0] == 0
            assert all(label in (follows[token], IGNORE) for token, label in zip(row[:size], row_labels, strict=False))
            assert all(row[t] == follows[row[t - 1]] for t in range(1, size) if row_starts[t] != t)
            lengths = [end - begin for begin, end in pairwise([*begins, size])]
            assert lengths == sorted(lengths, reverse=True)
        epochs.append(tokens.tolist())
    return epochs


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9).flatmap(
        lambda length: st.tuples(
            st.just(length),
            st.lists(
                st.integers(0, 3 * length)
                | st.sampled_from([0, 1, 2, length, length + 1, length + 2, 2 * length + 1, 5 * length]),
                min_size=1,
                max_size=60,
            ),
        )
    ),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 1 << 20]),
    st.booleans(),
)
def test_documents(
    make_source: Callable, case: tuple[int, list[int]], parts: int, in_memory: int, masked: bool
) -> None:
    seq_length, sizes = case
    if max(sizes) < 2:
        sizes.append(2)
    documents = numbered(sizes)
    masks = [[number % 3 > 0 for number in range(1, len(document) + 1)] for document in documents] if masked else None
    if masked:
        documents.append([10**6, 10**6 + 1, 10**6 + 2])
        masks.append([0, 1, 0])
    source = make_source(
        split(documents, parts),
        split(masks, parts) if masks else None,
        loss_on="responses" if masked else "all",
        in_memory=in_memory,
    )
    check_documents(source, documents, masks, seq_length)


def test_documents_move_from_epoch_to_epoch(make_source: Callable) -> None:
    """Rows come in another order, and documents of one size share them with others."""
    generator = random.Random(0)
    documents = numbered([generator.randint(2, 12) for _ in range(300)])
    epochs = check_documents(make_source([documents]), documents, None, 24)
    rows = [{tuple(row) for row in epoch} for epoch in epochs]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(rows[0] & rows[1]) < len(rows[0]) / 10
    sizes = [[sum(token != PADDING for token in row) for row in epoch] for epoch in epochs]
    assert sizes[0] != sizes[1]


def test_the_waste_is_small(make_source: Callable) -> None:
    generator = random.Random(0)
    sizes = [generator.randint(2, 200) for _ in range(500)]
    packed = pack(make_source([numbered(sizes)]), 128, packing="documents", padding=PADDING)
    assert packed.waste < 0.02


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_samples_do_not_depend_on_what_was_read_before(make_source: Callable, tmp_path: Path, packing: str) -> None:
    documents = numbered(SIZES)
    sources = [
        make_source(split(documents, 3), seed=3, in_memory=in_memory, cache_dir=tmp_path / "cache")
        for in_memory in (0, 0, 1 << 20)
    ]
    packed = [pack(source, 8, packing=packing, padding=PADDING) for source in sources]
    count = 4 * packed[0].samples
    document_starts = packing == "documents"
    expected = read(packed[0], 8, 0, count, document_starts=document_starts)
    numbers = random.Random(1).sample(range(count), count)
    for other in packed[1:]:
        for number in numbers:
            for rows, row in zip(expected, read(other, 8, number, 1, document_starts=document_starts), strict=True):
                assert np.array_equal(rows[number], row[0])
        assert [rows.tolist() for rows in read(other, 8, 10**9, 2, document_starts=document_starts)] == [
            rows.tolist() for rows in read(packed[0], 8, 10**9, 2, document_starts=document_starts)
        ]


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_memory_does_not_grow_with_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    monkeypatch.setattr(order, "CHUNK", 1 << 12)
    peaks = []
    for count in (20_000, 200_000):
        with TokenStoreWriter(tmp_path / str(count), vocab_size=100, masked=False) as writer:
            sizes = np.random.RandomState(0).randint(2, 9, count)
            writer.add(np.ones(sizes.sum(), np.int64), sizes)
        content = Content(TokenStore(tmp_path / str(count)), str(count), count, 0, 0)
        tracemalloc.start()
        source = MixtureSource("a", 1, [content], loss_on="all", number=0, seed=1, cache_dir=tmp_path, in_memory=10_000)
        packed = pack(source, 64, packing=packing, padding=0)
        for epoch in range(3):
            read(packed, 64, epoch * packed.samples, 2, document_starts=packing == "documents")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 180_000, "less than a byte for each further document"


@pytest.mark.parametrize(("packing", "message"), [("none", "has a token"), ("documents", "has two tokens")])
def test_nothing_to_predict(make_source: Callable, packing: str, message: str) -> None:
    sizes = [0, 0] if packing == "none" else [0, 1, 1]
    with pytest.raises(UserError, match=f"chats: none of its {len(sizes)} documents {message}: add data"):
        pack(make_source([numbered(sizes)]), 8, packing=packing, padding=PADDING)


def test_cut_and_excluded_documents_are_logged(make_source: Callable, capfd: pytest.CaptureFixture) -> None:
    pack(make_source([numbered([9, 10, 1, 0, 5])]), 8, packing="documents", padding=PADDING)
    told = capfd.readouterr().err
    assert "chats: 3 documents in 3 rows of 8 tokens, 12.50% of which is padding; 1 were cut" in told
    assert "chats: 2 documents have fewer than two tokens and are left out" in told
