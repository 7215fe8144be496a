"""Rows as documents: JSON lines, and tables of comma or tab separated values with a header."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openchatkit.retrieval.reading import streams
from openchatkit.retrieval.reading.document import Document, Options, Unreadable, one_line, paragraphs

# The names that a field is looked for by where none is given, the likeliest first.
_TEXT = ("text", "content", "body", "passage")
_TITLE = ("title", "name", "heading")
_SOURCE = ("url", "source", "link")
_MARKS = ",;\t"  # between the columns of a table; spreadsheets of half of Europe write the second
_FIELD_LIMIT = 1 << 24  # characters of a field of a table

Row = Mapping[str, Any]


def jsonl(path: Path, options: Options) -> Iterator[Document]:
    """One document a row; a row that is no object with a text is left out, noted and counted."""
    rows = (
        (number, _object(line)) for number, line in streams.lines(path, options.notes, whole_rows=True) if line.strip()
    )
    yield from _documents(path, rows, _text_field, options)


def table(path: Path, options: Options) -> Iterator[Document]:
    """One document a row: the field that holds the text, or all fields, each with its column's name.

    Columns are parted by the mark that the header has most of.
    """
    csv.field_size_limit(_FIELD_LIMIT)
    lines = (f"{line}\n" for _, line in streams.lines(path, options.notes, whole_rows=True))
    head = next(lines, "")
    tabs = streams.plain_name(path).lower().endswith(".tsv")
    mark = "\t" if tabs else max(_MARKS, key=head.count)
    reader = csv.DictReader(itertools.chain([head], lines), delimiter=mark, restkey=None)
    try:
        if not reader.fieldnames:
            raise Unreadable("holds no header: expected the names of the columns in its first row")
        if options.text_field and options.text_field not in reader.fieldnames:
            raise Unreadable(_no_field(options.text_field, reader.fieldnames))
        yield from _documents(path, enumerate(reader, 1), _text_or_all, options)
    except csv.Error as error:
        raise Unreadable(f"line {reader.line_num} is no row of a table: {error}") from error


def _documents(
    path: Path, rows: Iterator[tuple[int, Row | None]], text_of: Callable[[Row, Options], str], options: Options
) -> Iterator[Document]:
    found, bad, first, fields = 0, 0, 0, {}
    for number, row in rows:
        text = text_of(row, options) if row is not None else ""
        if not text.strip():
            bad, first = bad + 1, first or number
            fields = fields or dict(row or {})
            continue
        found += 1
        title = one_line(_string(_first(row, options.title_field, _TITLE)))
        source = one_line(_string(_first(row, options.source_field, _SOURCE)), 2000)
        yield Document(paragraphs(text, number), "row", title or streams.stem(path), source)
    if bad and not found:
        raise Unreadable(_no_field(options.text_field or _TEXT[0], list(fields)))
    if bad:
        options.notes.append(f"{bad:,} rows without a text, the first of them row {first:,}")


def _no_field(name: str, fields: list[str]) -> str:
    return f"no row has a field {name!r} (its fields: {', '.join(map(str, fields[:8])) or 'none'}); see --text-field"


def _object(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _text_field(row: Row, options: Options) -> str:
    return _string(_first(row, options.text_field, _TEXT))


def _text_or_all(row: Row, options: Options) -> str:
    text = _text_field(row, options)
    if text or options.text_field or any(name in row for name in _TEXT):
        return text
    return "\n".join(f"{name}: {value}" for name, value in row.items() if name and value and str(value).strip())


def _first(row: Row, given: str | None, usual: tuple[str, ...]) -> Any:
    """The value of a field: of the one that was named, or of the first that has one of the usual names and a value."""
    names = (given,) if given else usual
    return next((row[name] for name in names if row.get(name)), "")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    # JSON can spell halves of characters, which no file can hold.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
