"""Fields of a row -> documents of tokens, one for each field, in `tools/preprocess_data.py`.

A field is a text, taken whole as in GPT-NeoX, or a chat in either form of `data.records.document`, cut at its roles as
in training. A text that is empty or has no tokens is not a document, as in GPT-NeoX. Worker processes run this, so
nothing here imports torch or transformers.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from openchatkit.data.records import document
from openchatkit.data.records.document import BadRowError
from openchatkit.data.records.tables import CARRIERS
from openchatkit.data.stores.tokenise import Tokenised, assemble
from openchatkit.formats import chat
from openchatkit.formats.neox_tokenizers import NeoxTokenizer


@dataclass(frozen=True)
class FieldOptions:
    """Which fields become documents, and how. `chats`: they are cut at roles, and there is a mask on responses."""

    encoder: NeoxTokenizer
    keys: tuple[str, ...]
    append_eod: bool
    ftfy: bool
    chats: bool


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
    return TokenisedFields({key: _documents(chats, job) for key, chats in found.items()}, bad)


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
