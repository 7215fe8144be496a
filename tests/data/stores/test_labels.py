"""Label stores: what they train on against a plain reading of both stores, and those that are refused."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from openchatkit import storage
from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.stores import labels as module
from openchatkit.data.stores.labels import labelled_store
from openchatkit.errors import UserError
from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.formats.token_store import NOT_TRAINED, TokenStore

TEXTS = [[5, 6, 7, 8, 0], [9, 0], [10, 11, 12, 13, 14, 0]]
LABELS = [[-100, -100, 7, 8, 0], [9, 0], [-100, -100, -100, -100, -100, -100]]


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "<i4") -> Path:
    with TokenStoreWriter(prefix, dtype=np.dtype(dtype), masked=False) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]))
    return prefix


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_labels_are_of_the_next_token(tiny_tokenizer: Path, tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "texts", TEXTS, dtype)
    write(tmp_path / "labels", LABELS)
    expected = {}
    for text, beside in zip(TEXTS, LABELS, strict=True):
        for (token, following), label in zip(itertools.pairwise(text), beside[1:], strict=True):
            expected[token, following] = IGNORE if label == NOT_TRAINED else label
    name = f"{tmp_path}/texts[labels={tmp_path}/labels]"
    options = DataOptions(tiny_tokenizer, seq_length=8, packing="none", loss_on="responses", data_cache=tmp_path / "c")
    data = build_dataset(f"{name}:2", options)
    assert data.sources[0].trained_tokens == sum(label != NOT_TRAINED for label in itertools.chain(*LABELS))
    batch = data.batch(0, 3)
    found = {
        (token, following): label
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        for token, following, label in zip(tokens, tokens[1:], labels, strict=False)
        if following != 1  # padding
    }
    assert found == expected


def test_a_store_may_train_on_all_of_its_texts(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """As one of plain texts beside one of chats does: GPT-NeoX wants labels of all stores or of none."""
    write(tmp_path / "texts", TEXTS)
    name = f"{tmp_path}/texts[labels={tmp_path}/texts]"
    options = DataOptions(tiny_tokenizer, seq_length=8, loss_on="responses", data_cache=tmp_path / "c")
    assert (build_dataset(name, options).batch(0, 1).labels != IGNORE).all()


@pytest.mark.parametrize(
    ("labels", "dtype", "message"),
    [
        (LABELS[:2], "<i4", "it holds 2 documents and the texts 3"),
        ([LABELS[0], [9], LABELS[2]], "<i4", "it holds 12 tokens and the texts 13"),
        ([LABELS[0][:4], [0, *LABELS[1]], LABELS[2]], "<i4", "document 0 has 5 tokens and 4 labels"),
        ([LABELS[0], [9, 0], [*LABELS[2][:4], 7, 0]], "<i4", "token 4 of document 2 is 14, its label 7"),
        ([LABELS[0], [9, -1], LABELS[2]], "<i4", "token 1 of document 1 is 0, its label -1"),
        (TEXTS, "<u2", r"labels.bin is uint16, which cannot hold -100: expected a store of labels"),
    ],
)
def test_labels_out_of_step(tmp_path: Path, labels: list[list[int]], dtype: str, message: str) -> None:
    write(tmp_path / "texts", TEXTS)
    write(tmp_path / "labels", labels, dtype)
    with pytest.raises(UserError, match=message):
        labelled_store(tmp_path / "texts", tmp_path / "labels", tmp_path / "cache")


def test_the_first_difference_is_named_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any piece of those that are compared at a time."""
    write(tmp_path / "texts", TEXTS)
    monkeypatch.setattr("openchatkit.formats.label_store._PIECE", 2)
    for document, text in enumerate(TEXTS):
        for token, right in enumerate(text):
            wrong = [[*each] for each in TEXTS]
            wrong[document][token] = 99
            wrong[2][5] = 99
            write(tmp_path / "labels", wrong)
            named = f"token {token} of document {document} is {right}, its label 99"
            with pytest.raises(UserError, match=named):
                labelled_store(tmp_path / "texts", tmp_path / "labels", tmp_path / "cache")


def test_the_comparison_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "texts", TEXTS)
    write(tmp_path / "labels", LABELS)
    monkeypatch.setattr(storage, "SETTLED_SECONDS", -1e9)
    store, identity = labelled_store(tmp_path / "texts", tmp_path / "labels", tmp_path / "cache")
    assert store.mask[:].tolist() == [int(label != NOT_TRAINED) for label in itertools.chain(*LABELS)]
    with monkeypatch.context() as once:
        once.setattr(module, "find_difference", None)
        assert labelled_store(tmp_path / "texts", tmp_path / "labels", tmp_path / "cache")[1] == identity
    write(tmp_path / "labels", [LABELS[0], [8, 0], LABELS[2]])
    with pytest.raises(UserError, match="token 0 of document 1 is 9, its label 8"):
        labelled_store(tmp_path / "texts", tmp_path / "labels", tmp_path / "cache")


def test_nothing_is_copied(tmp_path: Path) -> None:
    write(tmp_path / "texts", TEXTS)
    write(tmp_path / "labels", LABELS)
    store, _ = labelled_store(tmp_path / "texts", tmp_path / "labels", tmp_path / "cache")
    assert len(store.mask) == len(TokenStore(tmp_path / "labels").tokens)
    assert not isinstance(store.mask, np.ndarray)


@pytest.mark.parametrize(
    ("name", "loss_on", "message"),
    [
        ("{tmp}/texts[labels={tmp}/labels]", "all", "labels are followed with --loss-on responses: pass that"),
        ("{tmp}/texts[labels={tmp}/none]", "responses", "--task-name: there is no token store {tmp}/none: expected"),
        ("{tmp}/none[labels={tmp}/labels]", "responses", "--task-name: there is no token store {tmp}/none: expected"),
        ("{tmp}/texts[labels={tmp}/nothing]:1", "responses", "nothing would be trained on, since its labels are all"),
    ],
)
def test_mistakes(tiny_tokenizer: Path, tmp_path: Path, name: str, loss_on: str, message: str) -> None:
    write(tmp_path / "texts", TEXTS)
    write(tmp_path / "labels", LABELS)
    write(tmp_path / "nothing", [[NOT_TRAINED] * len(text) for text in TEXTS])
    options = DataOptions(tiny_tokenizer, seq_length=8, loss_on=loss_on, data_cache=tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        build_dataset(name.format(tmp=tmp_path), options)
    assert message.format(tmp=tmp_path) in str(caught.value)
