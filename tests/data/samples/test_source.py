"""`data.samples.source`: copying from several stores, and the errors of a source."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numbered import numbered

from openchatkit.errors import UserError
from openchatkit.formats.token_store import idx_path

DOCUMENTS = numbered([3, 0, 5, 1, 4, 2, 6])


def test_pieces_of_several_stores(make_source: Callable) -> None:
    stores = [DOCUMENTS[:2], [], DOCUMENTS[2:5], DOCUMENTS[5:]]
    masks = [[[token % 2 for token in document] for document in store] for store in stores]
    masks[3] = None  # a store of records in which nobody replies
    source = make_source(stores, masks, loss_on="responses")
    assert (source.documents, source.tokens, source.rows, source.quarantined) == (7, 21, 7, 0)
    assert [sizes.tolist() for sizes in source.all_sizes()] == [[3, 0], [5, 1, 4], [2, 6]]
    pieces = [(6, 1, 4), (0, 0, 3), (4, 3, 1), (2, 0, 0), (1, 0, 0), (2, 2, 3), (6, 0, 1), (3, 0, 1)]
    documents, begins, sizes = (np.array(column) for column in zip(*pieces, strict=True))
    assert source.sizes(documents).tolist() == [6, 3, 4, 5, 0, 5, 6, 1]
    tokens, mask = np.empty(13, np.int64), np.empty(13, bool)
    source.copy(documents, begins, sizes, tokens, mask)
    expected = [(token, number) for number, begin, size in pieces for token in DOCUMENTS[number][begin : begin + size]]
    assert tokens.tolist() == [token for token, _ in expected]
    assert mask.tolist() == [token % 2 == 1 and number < 5 for token, number in expected]


def test_sources_shuffle_apart(make_source: Callable) -> None:
    orders = {
        tuple(make_source([numbered([1] * 50)], seed=seed, number=number).order(epoch).tolist())
        for seed in range(2)
        for number in range(2)
        for epoch in range(2)
    }
    assert len(orders) == 8


@pytest.mark.parametrize("elsewhere", [None, 1 << 20])
def test_trained_tokens(make_source: Callable, elsewhere: int | None) -> None:
    masks = [[[int(token > 10) for token in document] for document in DOCUMENTS]]
    count = sum(map(sum, masks[0]))
    assert make_source([DOCUMENTS], masks, elsewhere=elsewhere, loss_on="responses").trained_tokens == count
    assert make_source([DOCUMENTS], masks, elsewhere=elsewhere, loss_on="all").trained_tokens == 21


@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_excluded_tokens_are_never_trained_on(make_source: Callable, loss_on: str) -> None:
    marks = [[[number % 3 for number, _ in enumerate(document)] for document in DOCUMENTS]]
    source = make_source([DOCUMENTS], marks, elsewhere=1 << 20, loss_on=loss_on)
    tokens, mask = np.empty(6, np.int64), np.empty(6, bool)
    source.copy(np.array([6]), np.array([0]), np.array([6]), tokens, mask)
    assert mask.tolist() == [[True, True, False] * 2, [False, True, False] * 2][loss_on == "responses"]
    trained = (1,) if loss_on == "responses" else (0, 1)
    assert source.trained_tokens == sum(mark in trained for document in marks[0] for mark in document)


def test_a_store_of_bytes_is_refused(make_source: Callable) -> None:
    documents = [[number % 256 for number in range(1000)]] * 12
    with pytest.raises(UserError, match=r"store0: its first 10,000 tokens are all below 256, as CharLevelTokenizer"):
        make_source([documents], elsewhere=50_000)
    make_source([[[*documents[0][:-1], 300]] * 12], elsewhere=50_000)
    make_source([documents], elsewhere=256)


@pytest.mark.parametrize(
    ("mark", "elsewhere", "message"),
    [
        (0, None, "nothing would be trained on .* in none of its 7 documents a line starts with `<bot>:`"),
        (0, 1 << 20, "nothing would be trained on .* its loss mask is all zeros"),
        (1, None, "its loss mask is all ones, so --loss-on responses would train on prompts as on replies"),
        (1, 1 << 20, "its loss mask is all ones"),
        (None, 1 << 20, r"has no loss mask \(.*store0\.mask\.bin\), so --loss-on responses cannot tell"),
    ],
)
def test_masks_that_mask_nothing(make_source: Callable, mark: int | None, elsewhere: int | None, message: str) -> None:
    masks = [None if mark is None else [[mark] * len(document) for document in DOCUMENTS]]
    with pytest.raises(UserError, match=f"chats:? {message}.*--loss-on all"):
        make_source([DOCUMENTS], masks, elsewhere=elsewhere, loss_on="responses")
    make_source([DOCUMENTS], masks, elsewhere=elsewhere, loss_on="all")


@pytest.mark.parametrize("elsewhere", [None, 1 << 20])
def test_masks_are_checked_over_the_whole_source(make_source: Callable, elsewhere: int | None) -> None:
    ones, zeros = ([[mark] * len(document) for document in DOCUMENTS] for mark in (1, 0))
    source = make_source([DOCUMENTS, DOCUMENTS], [ones, zeros], elsewhere=elsewhere, loss_on="responses")
    assert source.trained_tokens == 21


def test_tokens_that_the_tokenizer_does_not_have(make_source: Callable) -> None:
    source = make_source([numbered([9]), DOCUMENTS], elsewhere=20)
    documents = np.array([3, 0, 1])  # tokens 4 to 8, 0 to 8, 0 to 2
    tokens, mask = np.empty(17, np.int64), np.empty(17, bool)
    source.copy(documents, np.zeros(3, int), np.array([5, 9, 3]), tokens, mask)
    assert tokens[:5].tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(
        UserError, match=r"store1: document 6 \(counted from 0\) holds the token 21, .* a vocabulary of 20: pass"
    ):
        source.copy(np.array([3, 7]), np.array([0, 0]), np.array([5, 5]), np.empty(10, np.int64), np.empty(10, bool))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, np.int32(7), r"store0\.idx: document 1 begins at byte {second}, expected 28: make the store again"),
        (0, np.int32(-1), r"store0\.idx: document 0 has -1 tokens: make the store again"),
        # In the file, so that the tokens of another document would be taken for this one's.
        (4 * len(DOCUMENTS), np.int64(4), r"store0\.idx: document 0 begins at byte 4, expected 0"),
    ],
)
def test_an_index_of_other_tokens(make_source: Callable, at: int, value: np.generic, message: str) -> None:
    source = make_source([DOCUMENTS], elsewhere=100)
    alter(idx_path(source.stores[0].prefix), 34 + at, value)
    with pytest.raises(UserError, match=message.format(second=4 * len(DOCUMENTS[0]))):
        reopen(source)


def test_an_index_of_other_tokens_in_a_part(make_source: Callable) -> None:
    store = make_source([DOCUMENTS]).stores[0]
    assert store.part(2, 6).find_index_damage() is None
    alter(idx_path(store.prefix), 34 + 4 * len(DOCUMENTS) + 8 * 4, np.int64(4))
    damaged = type(store)(store.prefix)
    assert damaged.part(2, 4).find_index_damage() is None
    assert damaged.part(2, 6).find_index_damage().endswith("store0.idx: document 2 begins at byte 4, expected 36")


def alter(path: Path, at: int, value: np.generic) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(content)


def reopen(source: object) -> object:
    """The same store once more, as one from elsewhere."""
    from openchatkit.data.samples.source import Content, MixtureSource
    from openchatkit.formats.token_store import TokenStore

    prefix = source.stores[0].prefix
    content = Content(TokenStore(prefix), "x", 7, vocab_size=100)
    return MixtureSource("chats", 1.0, [content], loss_on="all", number=0, seed=1, cache_dir=prefix.parent)
