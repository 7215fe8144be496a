"""Texts -> tokens and loss masks: which ids a document has, and which of them are trained on.

`formats.chat` cuts a text into segments; each is tokenised by itself, exactly as the shell does it, and end-of-text
closes the document. With a mask, a token is trained on when its segment is, and end-of-text when the chat ends with a
reply. Where results are kept is `data.cache`.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import chat

# Part of every cached store's key: raise it when the same text would give other tokens or another mask.
VERSION = 1

_BATCH_CHARACTERS = 1 << 19
_WORKERS = 2  # one turns ids into arrays while the other's batch is spread over the cores


@dataclass(frozen=True)
class Tokenised:
    """Documents one after another: tokens int32 [T], sizes int32 [N] in tokens, mask bool [T] (True: trained on)."""

    tokens: np.ndarray
    sizes: np.ndarray
    mask: np.ndarray


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Tokenised:
    """The tokens and the mask on responses of some documents."""
    chats = [chat.parse(text) for text in texts]
    encoded = iter(tokenizer.encode([segment.text for segments in chats for segment in segments]))
    pieces: list[list[int]] = []
    trained: list[bool] = []
    sizes: list[int] = []
    end = [tokenizer.end_of_text]
    for segments in chats:
        first = len(pieces)
        pieces.extend(itertools.islice(encoded, len(segments)))
        pieces.append(end)
        trained.extend(segment.trained for segment in segments)
        trained.append(chat.ends_with_reply(segments))
        sizes.append(sum(map(len, pieces[first:])))
    tokens = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, sum(sizes))
    mask = np.repeat(np.array(trained), [len(piece) for piece in pieces])
    return Tokenised(tokens, np.array(sizes, np.int32), mask)


def tokenise_all(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Tokenised]:
    """`tokenise` batch by batch, in order, reading ahead of it; holds a few batches at a time."""
    pending: deque[Future[Tokenised]] = deque()
    with ThreadPoolExecutor(_WORKERS) as workers:
        try:
            for batch in _batches(texts):
                pending.append(workers.submit(tokenise, batch, tokenizer))
                if len(pending) > _WORKERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
