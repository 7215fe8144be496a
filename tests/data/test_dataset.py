"""`data.dataset`: samples against a plain reading of the stream they are cut from, and the errors of a data set."""

import itertools
import json
import logging
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger

from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset, build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.formats.token_store import bin_path

END = "<|endoftext|>"


def write_chats(path: Path, count: int, *, seed: int = 0) -> list[str]:
    """Chats of various lengths, each with its own number in it."""
    generator = random.Random(seed)
    texts = []
    for number in range(count):
        turns = []
        for turn in range(generator.randint(1, 3)):
            turns.append(Turn("human", f"What is {number}?" + " on" * generator.randint(0, 9)))
            turns.append(Turn("bot", f"The answer is {path.name} {number}." + f" {turn}" * generator.randint(0, 9)))
        texts.append(chat.render_text(turns))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


@pytest.fixture
def build(tiny_tokenizer: Path, tmp_path: Path) -> object:
    def build(task_names: str, **options: object) -> Dataset:
        options = {"seq_length": 50, "seed": 1, "data_cache": tmp_path / "cache"} | options
        flag = options.pop("flag", "--task-name")
        return build_dataset(task_names, DataOptions(tiny_tokenizer, **options), flag=flag)

    return build


def sample(data: Dataset, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = data.batch(n, 1)
    return batch.tokens[0], batch.labels[0]


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [token for part in tokenizer.encode([s.text for s in chat.parse(text)]) for token in part] + [0]


@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_concatenated_windows_are_the_stream(build: object, tokenizer: Tokenizer, tmp_path: Path, loss_on: str) -> None:
    texts = write_chats(tmp_path / "a.jsonl", 40)
    data = build(str(tmp_path / "a.jsonl"), loss_on=loss_on)
    documents = Counter(tuple(document_ids(tokenizer, text)) for text in texts)
    total = sum(len(document) * count for document, count in documents.items())
    assert (data.sources[0].documents, data.sources[0].tokens) == (40, total)
    assert data.epoch_samples == -(-total // 50)
    batch = data.batch(0, 3 * data.epoch_samples)
    tokens, labels = batch.tokens, batch.labels
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.shape == labels.shape == (3 * data.epoch_samples, 50)
    # Rows follow one another at a stride of 50: all tokens in a row are the stream, whose every epoch is an order of
    # the documents, each once.
    stream = tokens.flatten().tolist()
    orders = []
    for epoch in range(3):
        part = stream[epoch * total : (epoch + 1) * total]
        ends = [0, *(np.flatnonzero(np.array(part) == 0) + 1).tolist()]
        order = [tuple(part[start:end]) for start, end in itertools.pairwise(ends)]
        assert Counter(order) == documents
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    # Labels are the next token of the stream, over the borders of rows and epochs too.
    following = torch.tensor(stream[1:])
    kept = labels.flatten()[:-1]
    trained = kept != IGNORE
    assert torch.equal(kept[trained], following[trained])
    if loss_on == "all":
        assert trained.all()
    else:
        expected = [
            segment.text + (END if last else "")
            for document in orders[0]
            for segments in [chat.parse(tokenizer.decode(list(document[:-1])))]
            for segment, last in zip(segments, [False] * (len(segments) - 1) + [True], strict=True)
            if segment.trained
        ]
        assert tokenizer.decode(kept[: total - 1][trained[: total - 1]].tolist()) == "".join(expected)


def test_a_window_may_cross_many_short_documents(build: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(60)))
    data = build(str(tmp_path / "a.jsonl"), seq_length=100)
    tokens = data.batch(0, 10).tokens.flatten().tolist()
    size = data.sources[0].tokens
    assert sorted(tokens[:size]) == sorted(tokens[size : 2 * size])


@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_one_document_a_row(build: object, tokenizer: Tokenizer, tmp_path: Path, loss_on: str) -> None:
    texts = write_chats(tmp_path / "a.jsonl", 40)
    messages = []
    handler = logger.add(messages.append, level=logging.WARNING, format="{message}")
    data = build(str(tmp_path / "a.jsonl"), packing="none", loss_on=loss_on, seq_length=60)
    data.batch(0, 80)
    logger.remove(handler)
    documents = {tuple(document_ids(tokenizer, text)): text for text in texts}
    cut = sum(len(document) > 61 for document in documents)
    assert 0 < cut < 40
    (message,) = messages
    assert f"a.jsonl: {cut} of 40 documents are longer than --seq-length 60 and lose their ends" in message
    assert data.epoch_samples == 40
    orders = []
    for epoch in range(3):
        order = []
        for number in range(40):
            tokens, labels = (row.tolist() for row in sample(data, epoch * 40 + number))
            (document,) = (d for d in documents if list(d[:60]) == tokens[: len(d)])
            order.append(document)
            size = min(len(document), 60)
            assert tokens[size:] == [tokenizer.padding] * (60 - size)
            assert all(labels[t] in (IGNORE, document[t + 1]) for t in range(min(len(document) - 1, 60)))
            assert labels[len(document) - 1 :] == [IGNORE] * (60 - len(document) + 1)
            if loss_on == "all":
                assert IGNORE not in labels[: len(document) - 1]
            else:
                replies = "".join(s.text for s in chat.parse(documents[document]) if s.trained) + END
                trained = tokenizer.decode([label for label in labels if label != IGNORE])
                assert replies.startswith(trained)
                assert trained == replies or len(document) > 61
        assert sorted(order) == sorted(documents)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_a_document_that_just_fits(build: object, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """seq_length + 1 tokens fit: the last is only predicted."""
    text = "<human>: What?\n<bot>: That.\n"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    ids = document_ids(tokenizer, text)
    messages = []
    handler = logger.add(messages.append, level=logging.WARNING, format="{message}")
    tokens, labels = sample(build(str(tmp_path / "a.jsonl"), packing="none", seq_length=len(ids) - 1), 0)
    logger.remove(handler)
    assert (tokens.tolist(), labels.tolist(), messages) == (ids[:-1], ids[1:], [])


@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_whole_documents_share_rows(build: object, tokenizer: Tokenizer, tmp_path: Path, loss_on: str) -> None:
    texts = write_chats(tmp_path / "a.jsonl", 60)
    documents = {tuple(document_ids(tokenizer, text)): text for text in texts}
    longest = max(map(len, documents))
    data = build(str(tmp_path / "a.jsonl"), packing="documents", loss_on=loss_on, seq_length=longest + 40)
    (packed,) = data.packed
    assert data.epoch_samples == packed.samples
    batch = data.batch(0, 2 * packed.samples)
    assert batch.document_starts.dtype == torch.int64
    assert batch.document_starts.shape == batch.tokens.shape
    found = []
    for tokens, labels, starts in zip(
        batch.tokens.tolist(), batch.labels.tolist(), batch.document_starts.tolist(), strict=True
    ):
        bounds = [t for t in range(len(tokens)) if starts[t] == t]
        for begin, end in itertools.pairwise([*bounds, len(tokens)]):
            if tokens[begin] == tokenizer.padding:
                assert (end - begin, labels[begin]) == (1, IGNORE)
                continue
            document = (*tokens[begin:end], tokenizer.end_of_text)
            assert document in documents
            trained = tokenizer.decode([label for label in labels[begin:end] if label != IGNORE])
            if loss_on == "all":
                assert tuple(labels[begin:end]) == document[1:]
            else:
                assert trained == "".join(
                    segment.text + (END if last else "")
                    for segments in [chat.parse(documents[document])]
                    for segment, last in zip(segments, [False] * (len(segments) - 1) + [True], strict=True)
                    if segment.trained
                )
            found.append(document)
    assert Counter(found) == Counter({document: 2 for document in documents})
    assert packed.waste == pytest.approx((batch.tokens == tokenizer.padding).double().mean().item())


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_any_order_of_access_gives_the_same_samples(build: object, tmp_path: Path, packing: str) -> None:
    for name, count in (("a", 30), ("b", 17), ("c", 50)):
        write_chats(tmp_path / f"{name}.jsonl", count)
    names = ",".join(
        f"{tmp_path}/{name}:{weight}" for name, weight in (("a.jsonl", 1), ("b.jsonl", 0.3), ("c.jsonl", 2))
    )
    data = build(names, packing=packing, loss_on="responses")
    batch = data.batch(0, 600)
    tokens, labels = batch.tokens, batch.labels
    generator = random.Random(0)
    other = build(names, packing=packing, loss_on="responses")
    assert other.fingerprint == data.fingerprint
    for _ in range(100):
        start, count = generator.randrange(590), generator.randint(1, 10)
        part = other.batch(start, count)
        assert torch.equal(part.tokens, tokens[start : start + count])
        assert torch.equal(part.labels, labels[start : start + count])
        assert (part.document_starts is None) == (packing != "documents")
        assert part.document_starts is None or torch.equal(
            part.document_starts, batch.document_starts[start : start + count]
        )
        assert torch.equal(part.sources, batch.sources[start : start + count])
    for n in generator.sample(range(600), 50):
        assert torch.equal(sample(other, n)[0], tokens[n])
        assert torch.equal(sample(other, n)[1], labels[n])
    far = data.batch(10**9, 2)
    assert torch.equal(other.batch(10**9, 2).tokens, far.tokens)


def test_sources_take_turns_and_keep_their_own_order(build: object, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 20)):
        write_chats(tmp_path / f"{name}.jsonl", count)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    mixed = build(f"{a}:1,{b}:3", packing="none", seq_length=100)
    assert [(source.name, source.weight) for source in mixed.sources] == [(str(a), 1.0), (str(b), 3.0)]
    assert mixed.epoch_samples == 50
    rows: dict[int, list[str]] = {0: [], 1: []}
    for n in range(400):
        text = tokenizer.decode(sample(mixed, n)[0].tolist())
        source = int(mixed.batch(n, 1).sources)
        assert ("a.jsonl" in text, "b.jsonl" in text) == (source == 0, source == 1)
        rows[source].append(text)
    assert abs(len(rows[0]) - 100) <= 2
    alone = build(str(a), packing="none", seq_length=100)
    assert rows[0] == [tokenizer.decode(sample(alone, n)[0].tolist()) for n in range(len(rows[0]))]
    epochs = [rows[1][start : start + 20] for start in range(0, len(rows[1]) - 20, 20)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)


@pytest.mark.parametrize("packing", ["concat", "none"])
def test_files_of_a_glob_are_one_source(build: object, tokenizer: Tokenizer, tmp_path: Path, packing: str) -> None:
    texts = [write_chats(tmp_path / f"part{n}.jsonl", 10 + n) for n in range(3)]
    data = build(f"{tmp_path}/part*.jsonl", packing=packing, loss_on="responses", seq_length=40)
    (source,) = data.sources
    documents = [tuple(document_ids(tokenizer, text)) for part in texts for text in part]
    assert (source.documents, source.tokens) == (33, sum(map(len, documents)))
    if packing == "none":
        starts = sorted(document[:20] for document in documents)
        assert sorted(tuple(row[:20]) for row in data.batch(0, 33).tokens.tolist()) == starts
    else:
        stream = data.batch(0, data.epoch_samples).tokens.flatten().tolist()[: source.tokens]
        assert Counter(stream) == Counter(token for document in documents for token in document)
    joined = build(f"{tmp_path}/part*.jsonl", packing="concat", loss_on="responses", seq_length=source.tokens - 1)
    trained = (sample(joined, 0)[1] != IGNORE).sum().item()
    assert trained == source.trained_tokens


def test_what_decides_the_samples_decides_the_fingerprint(build: object, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_chats(tmp_path / f"{name}.jsonl", 30)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    base = build(f"{a},{b}")
    moved = a.rename(tmp_path / "moved.jsonl")
    assert build(f"{moved},{b}").fingerprint == base.fingerprint
    others = [
        build(f"{moved}:2,{b}"),
        build(f"{b},{moved}"),
        build(f"{moved},{b}", seed=2),
        build(f"{moved},{b}", seq_length=49),
        build(f"{moved},{b}", packing="none"),
        build(f"{moved},{b}", packing="documents"),
        build(f"{moved},{b}", loss_on="responses"),
        build(f"{moved},{b}", mixture_unit="tokens"),
        build(f"{moved},{b}", document_separator="newline"),
        build(str(moved)),
    ]
    assert len({data.fingerprint for data in [base, *others]}) == 11
    elsewhere = build(f"{moved},{b}", data_cache=tmp_path / "other", bad_rows="quarantine")
    assert elsewhere.fingerprint == base.fingerprint
    assert not torch.equal(others[2].batch(0, 8).tokens, base.batch(0, 8).tokens)


def test_weights_are_shares_of_sequences_or_of_tokens(build: object, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(1000, 1050)))
    write_chats(tmp_path / "long.jsonl", 50)
    names = f"{tmp_path}/short.jsonl:1,{tmp_path}/long.jsonl:3"
    shares = {}
    for unit in ("sequences", "tokens"):
        data = build(names, packing="none", mixture_unit=unit, seq_length=64)
        batch = data.batch(0, 4000)
        held = (batch.tokens != tokenizer.padding).sum(dim=1)
        first = batch.sources == 0
        shares[unit] = (first.double().mean().item(), (held[first].sum() / held.sum()).item())
        for source, packed in enumerate(data.packed):
            assert packed.tokens_per_sample == pytest.approx(
                held[batch.sources == source].double().mean().item(), rel=0.05
            )
    assert shares["sequences"][0] == pytest.approx(0.25, abs=0.001)
    assert shares["sequences"][1] < 0.1
    assert shares["tokens"][1] == pytest.approx(0.25, abs=0.01)
    assert shares["tokens"][0] > 0.5
    quotas = {tuple(build(names, mixture_unit=unit).interleaving.quotas) for unit in ("sequences", "tokens")}
    assert len(quotas) == 1, "full rows hold equally many tokens"


def test_a_source_named_twice(build: object, tmp_path: Path) -> None:
    write_chats(tmp_path / "a.jsonl", 30)
    a = tmp_path / "a.jsonl"
    data = build(f"{a}:1,{a}:2,{a}")
    assert [source.name for source in data.sources] == [str(a), f"{a}#2", f"{a}#3"]
    orders = {tuple(source.order(0).tolist()) for source in data.sources}
    assert len(orders) == 3


def test_source_too_small(build: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hi"}')
    size = build(str(tmp_path / "a.jsonl"), packing="none").sources[0].tokens
    with pytest.raises(
        UserError, match=rf"a\.jsonl holds {size} tokens, too few for one sequence of {size}.*packing none"
    ):
        build(str(tmp_path / "a.jsonl"), seq_length=size)
    assert sample(build(str(tmp_path / "a.jsonl"), seq_length=size - 1), 7)[0].shape == (size - 1,)


def test_nothing_to_train_on(build: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Q: hi A: <bot>: hello"}\n' * 3)
    write_chats(tmp_path / "b.jsonl", 3)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"a\.jsonl: nothing would be trained on .* 3 documents .* starts with `<bot>:`"
        ):
            build(f"{tmp_path}/b.jsonl,{tmp_path}/a.jsonl", loss_on="responses")
    build(str(tmp_path / "a.jsonl"), seq_length=20)


def test_replies_after_the_cut(build: object, tmp_path: Path) -> None:
    text = chat.render_text([Turn("human", "on " * 60), Turn("bot", "yes")])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(UserError, match=r"a\.jsonl: all replies lie after the first 20 tokens"):
        build(str(tmp_path / "a.jsonl"), packing="none", loss_on="responses", seq_length=20)
    build(str(tmp_path / "a.jsonl"), packing="none", loss_on="all", seq_length=20)
    build(str(tmp_path / "a.jsonl"), packing="none", loss_on="responses", seq_length=200)


def test_errors_of_names_and_packings_come_through(build: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: expected 'text' to be a string"):
        build(str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"--evaluation-data: no file"):
        build(str(tmp_path / "b.jsonl"), flag="--evaluation-data")


def test_memory_does_not_grow_with_epochs(build: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(20_000)))
    data = build(str(tmp_path / "a.jsonl"), seq_length=64)
    epoch = data.epoch_samples
    data.batch(0, 2)
    tracemalloc.start()
    for number in range(1, 20):
        data.batch(number * epoch, 2)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 * 20_000 * (4 + 1 / 8) * 1.2, "two epochs' orders, and a sum for every 64th document"


def test_the_order_never_changes(build: object, tmp_path: Path) -> None:
    """A checkpoint stores a sample number: the samples after it must not change with numpy or with our code."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(10)))
    source = build(str(tmp_path / "a.jsonl"), packing="none", seed=7).sources[0]
    assert [source.order(epoch).tolist() for epoch in range(2)] == [
        [4, 5, 9, 8, 1, 7, 6, 0, 2, 3],
        [2, 5, 3, 4, 8, 6, 7, 1, 0, 9],
    ]


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_a_store_made_elsewhere(build: object, tokenizer: Tokenizer, tmp_path: Path, packing: str) -> None:
    """The same tokens as records and as a store of their own are the same samples."""
    texts = write_chats(tmp_path / "a.jsonl", 40)
    documents = [document_ids(tokenizer, text) for text in texts]
    records = build(str(tmp_path / "a.jsonl"), packing=packing)
    with TokenStoreWriter(tmp_path / "made", vocab_size=50_000, masked=False) as writer:
        writer.add(np.concatenate(documents), np.array([len(document) for document in documents]))
    data = build(f"{tmp_path}/made:2", packing=packing)
    (source,) = data.sources
    assert (source.rows, source.quarantined, source.documents) == (40, 0, 40)
    assert source.trained_tokens == source.tokens == records.sources[0].tokens
    expected, batch = records.batch(0, 100), data.batch(0, 100)
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.labels, expected.labels)
    assert packing != "documents" or torch.equal(batch.document_starts, expected.document_starts)
    assert data.fingerprint != records.fingerprint
    with pytest.raises(UserError, match=r"made has no loss mask \(.*made\.mask\.bin\)"):
        build(str(tmp_path / "made"), packing=packing, loss_on="responses")
    bin_path(tmp_path / "made").write_bytes(np.full(source.tokens, 49_999, np.uint16))
    changed = build(str(tmp_path / "made"), packing=packing)
    assert changed.fingerprint != data.fingerprint
    with pytest.raises(UserError, match=r"made: document \d+ .* holds the token 49999, and .* vocabulary of \d+: pass"):
        changed.batch(0, 1)


@pytest.mark.parametrize("packing", ["concat", "documents", "none"])
def test_some_documents_of_a_store_are_a_store_of_these_alone(build: object, tmp_path: Path, packing: str) -> None:
    documents = [np.full(number % 7 + 3, number + 2) for number in range(60)]
    for name, first, last in (("whole", 0, 60), ("some", 20, 55)):
        with TokenStoreWriter(tmp_path / name, vocab_size=300, masked=False) as writer:
            part = documents[first:last]
            writer.add(np.concatenate(part), np.array([len(document) for document in part]))
    some, those = build(f"{tmp_path}/some", packing=packing), build(f"{tmp_path}/whole[20:55]:3", packing=packing)
    expected, batch = some.batch(0, 30), those.batch(0, 30)
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.labels, expected.labels)
    assert len({data.fingerprint for data in (those, some, build(f"{tmp_path}/whole", packing=packing))}) == 3
    with pytest.raises(UserError, match=r"whole\[50:61\]: the store has documents 0 to 60"):
        build(f"{tmp_path}/whole[50:61]", packing=packing)
