"""Rows -> tokens and loss masks: the ids of a document, and which of them are trained on.

`data.records.document` cuts a row into segments; each is tokenised by itself, exactly as the shell does it, and the
separator closes the document: end-of-text, or the newline of the original kit, which put it in front (the stream is the
same). A token is trained on when its segment is, and the separator when the chat ends with a reply. Worker processes do
all of this; they import neither torch nor transformers. `builder` keeps the results.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from openchatkit.data.records.document import BadRowError, decode
from openchatkit.data.records.raw_row import RawRow
from openchatkit.data.stores import workers
from openchatkit.data.stores.pace import Pace
from openchatkit.data.tokenizer import Encode, Tokenizer, encoder
from openchatkit.formats import chat
from openchatkit.formats.token_store import CONTEXT, EXCLUDED, TRAINED

T = TypeVar("T")

# Part of every cached store's key: raise it when the same rows would give other tokens or another mask.
VERSION = 5


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """Documents one after another: tokens int32 [T], sizes int32 [N] in tokens, mask uint8 [T] (see `token_store`).

    `bad`: the rows that cannot be used, as (place among the rows given, reason). `spelled`: how many documents have the
    end-of-text token in their text, where it is no more than characters.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    mask: np.ndarray
    bad: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    spelled: int = 0


def tokenise(rows: Sequence[bytes], encode: Encode, separator: Sequence[int], *, marker: str = "") -> Tokenised:
    """Tokenise records, given as JSON, with the mask on their responses; `marker` is the end-of-text token."""
    chats: list[list[chat.Segment]] = []
    bad: list[tuple[int, str]] = []
    for place, row in enumerate(rows):
        try:
            chats.append(decode(row))
        except BadRowError as error:
            bad.append((place, str(error)))
    spelled = sum(any(marker in segment.text for segment in segments) for segments in chats) if marker else 0
    return dataclasses.replace(assemble(chats, encode, separator), bad=bad, spelled=spelled)


def assemble(
    chats: Sequence[Sequence[chat.Segment]], encode: Encode, separator: Sequence[int], *, skip_empty: bool = False
) -> Tokenised:
    """Tokenise documents that are cut into segments, and close each with the separator.

    `skip_empty` leaves out those whose segments have no tokens.
    """
    encoded = iter(encode([segment.text for segments in chats for segment in segments]))
    pieces: list[Sequence[int]] = []
    marks: list[int] = []
    sizes: list[int] = []
    for segments in chats:
        ids = list(itertools.islice(encoded, len(segments)))
        if skip_empty and not any(ids):
            continue
        pieces += ids
        pieces.append(separator)
        marks += map(_mark, segments)
        # The separator after the last turn is part of that turn.
        marks.append(_mark(segments[-1]) if segments else CONTEXT)
        sizes.append(sum(map(len, ids)) + len(separator))
    tokens = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, sum(sizes))
    mask = np.repeat(np.array(marks, np.uint8), np.array([len(piece) for piece in pieces], np.int64))
    return Tokenised(tokens, np.array(sizes, np.int32), mask)


def _mark(segment: chat.Segment) -> int:
    return TRAINED if segment.trained else EXCLUDED if segment.excluded else CONTEXT


def tokenise_all(
    rows: Iterable[RawRow],
    tokenizer: Tokenizer,
    *,
    separator: str,
    batch_bytes: int = Pace.batch_bytes,
    processes: int = 0,
) -> Generator[tuple[list[RawRow], Tokenised], None, None]:
    """Tokenise batch by batch, in order, in so many worker processes, or in this one if there are none.

    Rows that could not be read are among the bad ones, with the reader's reason.
    """
    closing, marker = separator_ids(tokenizer, separator), tokenizer.end_of_text_token
    batches = (
        (batch, [row.data for row in batch]) for batch in in_batches(rows, lambda row: len(row.data), batch_bytes)
    )
    done = workers.in_order(
        batches,
        processes=processes,
        make=_worker,
        arguments=(tokenizer.serialised if processes else "", closing, marker),
        here=lambda data: tokenise(data, tokenizer.encode, closing, marker=marker),
    )
    for batch, part in done:
        bad = [(place, batch[place].error or reason) for place, reason in part.bad]
        yield batch, dataclasses.replace(part, bad=bad)


def _worker(serialised: str, separator: Sequence[int], marker: str) -> Callable[[Sequence[bytes]], Tokenised]:
    """Return the function that a worker process applies to batches of rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are shared out by processes
    return functools.partial(tokenise, encode=encoder(serialised), separator=separator, marker=marker)


def separator_ids(tokenizer: Tokenizer, separator: str) -> list[int]:
    """Return the ids that close each document, for a value of --document-separator."""
    assert separator in ("end-of-text", "newline"), separator
    return [tokenizer.end_of_text] if separator == "end-of-text" else tokenizer.encode(["\n"])[0]


def in_batches(rows: Iterable[T], size_of: Callable[[T], int], batch_bytes: int) -> Iterator[list[T]]:
    """Yield rows in lists of at least `batch_bytes`; `size_of` returns a row's bytes."""
    batch: list[T] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += size_of(row)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
