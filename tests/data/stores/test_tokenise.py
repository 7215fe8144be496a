"""`data.stores.tokenise`: special tokens in a text stay text, and exactly the replies are trained on."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from openchatkit import paths
from openchatkit.data.records.document import texts
from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.data.stores.tokenise import Tokenised, separator_ids, tokenise, tokenise_all
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.formats.token_store import EXCLUDED

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


def rows(texts: Iterable[str]) -> Iterator[RawRow]:
    for number, text in enumerate(texts, 1):
        yield RawRow(number, json.dumps({"text": text}).encode(), Mark(number))


def tokenise_texts(texts: list[str], tokenizer: Tokenizer, *, separator: str = "end-of-text") -> Tokenised:
    closing = separator_ids(tokenizer, separator)
    return tokenise([row.data for row in rows(texts)], tokenizer.encode, closing)


def trained_text(tokenizer: Tokenizer, part: Tokenised) -> list[str]:
    """The text of each run of tokens that are trained on."""
    borders = np.flatnonzero(np.diff(part.mask, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(part.tokens[start:end].tolist()) for start, end in borders]


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    text = f"<human>: {END}<|padding|> ok{END}\n<bot>: {END}\n"
    part = tokenise_texts([text], tokenizer)
    assert part.tokens.tolist().count(0) == 1
    assert part.tokens[-1] == 0
    assert 1 not in part.tokens
    assert tokenizer.decode(part.tokens.tolist()) == text + END


def test_only_replies_are_trained_on(tokenizer: Tokenizer) -> None:
    turns = [
        Turn("human", "What does it say?", passages=("The first\npassage.", "Another <bot>: one.")),
        Turn("bot", "It says\n\nthis on two lines."),
        Turn("human", "And <bot>: then? <|endoftext|>"),
        Turn("bot", "Nothing."),
    ]
    text = chat.render_text(turns, system="Current Date: 2026-11-20\nCurrent Time: 22:35:00 PM UTC")
    part = tokenise_texts([text], tokenizer)
    assert tokenizer.decode(part.tokens.tolist()) == text + END
    assert trained_text(tokenizer, part) == [" It says\n\nthis on two lines.\n<human>:", f" Nothing.\n{END}"]


def test_chats_that_do_not_end_with_a_reply(tokenizer: Tokenizer) -> None:
    open_end = chat.render_text([Turn("human", "a"), Turn("bot", "b"), Turn("human", "c")])
    part = tokenise_texts([open_end, "no roles at all", "<human>: x\n"], tokenizer)
    assert trained_text(tokenizer, part) == [" b\n<human>:"]
    assert part.tokens[np.cumsum(part.sizes) - 1].tolist() == [0, 0, 0]
    assert not part.mask[part.tokens == 0].any()


def test_random_chats(tokenizer: Tokenizer) -> None:
    """Replies and the ends of their turns, nothing else, whatever the turns hold."""
    generator = random.Random(0)
    words = ["a", "<human>:", "<bot>:", "\n", "  ", END, "é", "你好", "the answer", "> x", "\u200b", "Passages:"]
    chats, expected = [], []
    for _ in range(300):
        turns = []
        for _ in range(generator.randint(1, 4)):
            human, bot = (" ".join(generator.choices(words, k=generator.randint(0, 8))) for _ in range(2))
            passages = tuple(generator.choices(words, k=generator.randint(0, 3)))
            turns += [Turn("human", human, passages), Turn("bot", bot)]
        if generator.random() < 0.2:
            turns.pop()
        replies = [f" {chat.content(turn.text)}\n" for turn in turns if turn.role == "bot"]
        ends = ["<human>:"] * (len(replies) - (turns[-1].role == "bot")) + [END] * (turns[-1].role == "bot")
        expected.append([reply + end for reply, end in zip(replies, ends, strict=True)])
        chats.append(chat.render_text(turns))
    for text, replies in zip(chats, expected, strict=True):
        part = tokenise_texts([text], tokenizer)
        assert trained_text(tokenizer, part) == replies
        assert tokenizer.decode(part.tokens.tolist()) == text + END


@pytest.mark.parametrize("separator", ["end-of-text", "newline"])
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_keep_the_order(tokenizer: Tokenizer, processes: int, separator: str) -> None:
    """Bad rows among them, and rows that could not be read."""
    texts = [f"<human>: {'q' * (n % 37)}\n<bot>: {n}\n{END}" for n in range(100)]
    mixed = list(rows(texts))
    mixed.insert(70, RawRow(1070, b"{}", Mark(1070)))
    mixed.insert(30, RawRow(1030, b"", Mark(1030), error="too long"))
    found = list(tokenise_all(iter(mixed), tokenizer, separator=separator, batch_bytes=200, processes=processes))
    assert len(found) > 10
    assert [row for batch, _ in found for row in batch] == mixed
    bad = [(batch[place].number, reason) for batch, part in found for place, reason in part.bad]
    assert bad == [(1030, "too long"), (1070, "the record has no 'text' and no 'messages' (its keys: none)")]
    whole = tokenise_texts(texts, tokenizer, separator=separator)
    for name in ("tokens", "sizes", "mask"):
        assert np.array_equal(np.concatenate([getattr(part, name) for _, part in found]), getattr(whole, name))
    assert len(whole.sizes) == 100


def test_newlines_between_documents_are_the_original_stream(tokenizer: Tokenizer) -> None:
    texts = ["<human>: a\n<bot>: b", "plain", "<human>: a\n<bot>: b\n<human>: c"]
    part = tokenise_texts(texts, tokenizer, separator="newline")
    assert tokenizer.decode(part.tokens.tolist()) == "\n".join([*texts, ""])
    assert trained_text(tokenizer, part) == [" b\n", " b\n<human>:"]
    assert 0 not in part.tokens


def test_an_untrained_reply_at_the_end(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    part = tokenise([json.dumps({"messages": turns}).encode()], tokenizer.encode, [0])
    assert tokenizer.decode(part.tokens.tolist()) == f"<human>: a\n<bot>: b\n{END}"
    # `b`, the end of its turn and of the chat: never trained on.
    assert part.mask.tolist()[-4:] == [EXCLUDED] * 4
    assert not part.mask[:-4].any()


def test_only_bad_rows(tokenizer: Tokenizer) -> None:
    part = tokenise([b"", b"{}"], tokenizer.encode, [0])
    assert (len(part.tokens), len(part.sizes), len(part.mask), len(part.bad)) == (0, 0, 0, 2)


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_among_the_rows_comes_through(tokenizer: Tokenizer, processes: int) -> None:
    def broken() -> Iterator[RawRow]:
        yield from rows(["fine"])
        raise UserError("line 2")

    with pytest.raises(UserError, match="line 2"):
        list(tokenise_all(broken(), tokenizer, separator="end-of-text", processes=processes))


def test_the_record_that_the_readme_shows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    readme = (paths.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(readme.split("```json\n")[1].split("```")[0])
    part = tokenise_texts(list(texts(tmp_path / "a.jsonl")), tokenizer)
    assert trained_text(tokenizer, part) == [" Paris.\n<human>:", f" Rome.\n{END}", f" Madrid.\n{END}"]
