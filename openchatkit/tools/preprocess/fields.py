"""Fields of a row -> documents of tokens, one for each field, in `tools/preprocess_data.py`.

A field is a text, taken whole as in GPT-NeoX, or a chat in either form of `data.records.document`, cut at its roles as
in training. A text that is empty or has no tokens is not a document, as in GPT-NeoX. Worker processes run this, so
nothing here imports torch or transformers.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from openchatkit.data.records import document
from openchatkit.data.records.document import BadRowError
from openchatkit.data.records.tables import CARRIERS
from openchatkit.data.stores.tokenise import Tokenised, assemble
from openchatkit.formats import chat
from openchatkit.formats.neox_tokenizers import NeoxTokenizer
from openchatkit.formats.token_store import NOT_TRAINED, choose_dtype

LABELS = "label"  # the key of the store of labels, as GPT-NeoX names it


@dataclass(frozen=True)
class FieldOptions:
    """Which fields become documents, and how. `chats`: they are cut at roles, and there is a mask on responses.

    `context_end` are ids: the one field has a store of labels beside it, which do not train on the tokens of a document
    up to the end of the first place that holds these. Both stores are int32 then, as in GPT-NeoX.
    """

    encoder: NeoxTokenizer
    keys: tuple[str, ...]
    append_eod: bool
    ftfy: bool
    chats: bool
    context_end: tuple[int, ...] = ()

    @property
    def stores(self) -> tuple[str, ...]:
        """The keys of all stores that are written."""
        return (*self.keys, LABELS) if self.context_end else self.keys

    @property
    def dtype(self) -> np.dtype:
        """The type of their tokens."""
        return np.dtype("<i4") if self.context_end else choose_dtype(self.encoder.vocab_size)


class TokenisedFields(NamedTuple):
    """The documents of each key, and the rows that cannot be used, as (place among the rows given, reason)."""

    documents: dict[str, Tokenised]
    bad: list[tuple[int, str]]


def worker(job: FieldOptions) -> Callable[[Sequence[bytes]], TokenisedFields]:
    """Return the function that a worker process applies to batches of rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are shared out by processes
    return functools.partial(encode, job=job)


def encode(rows: Sequence[bytes], job: FieldOptions) -> TokenisedFields:
    """Return the documents of some rows, given as JSON; a row that is bad under one key has none under any."""
    found: dict[str, list[list[chat.Segment]]] = {key: [] for key in job.keys}
    bad: list[tuple[int, str]] = []
    for place, row in enumerate(rows):
        try:
            segments = [_segments(row, key, job) for key in job.keys]
        except BadRowError as error:
            bad.append((place, str(error)))
            continue
        for key, cut in zip(job.keys, segments, strict=True):
            found[key].append(cut)
    documents = {key: _documents(chats, job) for key, chats in found.items()}
    if job.context_end:
        (texts,) = documents.values()
        documents[LABELS] = _label(texts, job.context_end)
    return TokenisedFields(documents, bad)


def _label(texts: Tokenised, context_end: Sequence[int]) -> Tokenised:
    """Return the labels of some documents; where a document holds no `context_end`, all of its tokens are labels."""
    tokens, ends = texts.tokens, np.cumsum(texts.sizes, dtype=np.int64)
    last = len(tokens) - len(context_end)  # the last place at which it can begin
    places = np.arange(max(last + 1, 0))
    for offset, id in enumerate(context_end):
        places = places[tokens[places + offset] == id]
    stops = places + len(context_end)
    documents = np.searchsorted(ends, places, side="right")
    inside = stops <= ends[documents]
    documents, first = np.unique(documents[inside], return_index=True)
    context = np.zeros(len(ends), np.int64)  # where the context of each document ends, as a place in `tokens`
    context[documents] = stops[inside][first]
    return replace(
        texts, tokens=np.where(np.arange(len(tokens)) < np.repeat(context, texts.sizes), NOT_TRAINED, tokens), spelled=0
    )


def _documents(chats: Sequence[list[chat.Segment]], job: FieldOptions) -> Tokenised:
    end = job.encoder.end_of_text if job.append_eod else None
    assert end is not None or not job.append_eod
    encode = functools.partial(job.encoder.encode, literal=job.chats)
    return assemble(chats, encode, [] if end is None else [end], skip_empty=True)


def _segments(row: bytes, key: str, job: FieldOptions) -> list[chat.Segment]:
    """Cut one field where tokens must not cross; return no segments for an empty text."""
    record = document.read_object(row)
    if key not in record:
        found = ", ".join(repr(name) for name in list(record)[:5]) or "none"
        raise BadRowError(f"the record has no {key!r} (its keys: {found})")
    value = record[key]
    if job.ftfy:
        value = _mend(value)
    if value == "":
        return []
    if job.chats:
        form = "messages" if isinstance(value, list) else "text"
        return document.segments({key: record[key] for key in CARRIERS if key in record} | {form: value})
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n\n".join(value)  # paragraphs, as GPT-NeoX's reader joins them
    is_blank = isinstance(value, str) and not value.strip()
    return [chat.Segment(str(value) if is_blank else document.usable_string(value, repr(key)), False)]


def _mend(value: object) -> object:
    """Return `value` with its text, or the contents of its messages, mended by ftfy."""
    import ftfy

    if isinstance(value, str):
        return ftfy.fix_text(value)
    if isinstance(value, list):
        return [_mend(part) for part in value]
    if isinstance(value, dict) and "content" in value:
        return value | {"content": _mend(value["content"])}
    return value
