"""Rows as documents: JSON lines, arrays in JSON, and tables of comma or tab separated values."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openchatkit.jsonl import parse_object
from openchatkit.retrieval.reading import encodings, prose, streams
from openchatkit.retrieval.reading.document import Document, ReadOptions, Unreadable, one_line, paragraphs

# Usual names of fields, tried in this order if none is given.
_TEXT = ("text", "content", "body", "passage")
_TITLE = ("title", "name", "heading")
_SOURCE = ("url", "source", "link")
_MARKS = ",;\t"  # between columns; spreadsheets in half of Europe write semicolons
_PEEKED = 20  # rows compared with the first, which may be a header
_YEAR = re.compile(r"(1[5-9]|20)\d\d")
# Not a column name: a number or amount of money, a date or time, an address, a sentence.
_VALUE = re.compile(r".{200,}|[-+$€£(]*\d[\d.,:/ T-]*[%€$£)Z]*|\w+://\S+|\S+@\S+\.\w+|(\S+\s+){3,}\S+[.!。]", re.DOTALL)
_FIELD_LIMIT = 1 << 24  # characters of a field of a table

Fields = Mapping[str, Any]


def jsonl(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield one document a row; rows that are not objects with a text are skipped, counted and noted."""
    lines = streams.lines(path, options.notes, whole_rows=True)
    rows = ((number, parse_object(line)) for number, line in lines if line.strip())
    yield from _documents(path, rows, _text_field, options)


def json_file(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield one document for each object with a text in an array; any other JSON is read as plain text."""
    data = streams.whole(path, options.max_bytes)
    notes: list[str] = []
    try:
        found = json.loads(encodings.decode(data, encodings.detect_mark(data) or "utf-8", notes))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and any(isinstance(row, dict) and _text_field(row, options).strip() for row in found):
        options.notes += notes
        rows = enumerate((row if isinstance(row, dict) else None for row in found), 1)
        yield from _documents(path, rows, _text_field, options)
    else:
        yield from prose.code(path, options)


def table(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield one document a row of a text table. The most frequent mark of the first row separates columns."""
    csv.field_size_limit(_FIELD_LIMIT)
    lines = (f"{line}\n" for _, line in streams.lines(path, options.notes, whole_rows=True))
    head = next(lines, "")
    tabs = streams.plain_name(path).lower().endswith(".tsv")
    mark = "\t" if tabs else max(_MARKS, key=head.count)
    reader = csv.reader(itertools.chain([head], lines), delimiter=mark)
    try:
        yield from of_cells(path, filter(None, reader), options)
    except csv.Error as error:
        raise Unreadable(f"line {reader.line_num} is not a row of a table: {error}") from error


def of_cells(path: Path, cells: Iterator[list[str]], options: ReadOptions) -> Iterator[Document]:
    """Yield one document a row: the field with the text, or all fields, each with the name of its column.

    If the first row is not a header, columns are named by their numbers, which are not part of the texts.
    """
    first = list(itertools.islice(cells, _PEEKED))
    if not any(map(any, first)):
        raise Unreadable("holds no text")
    if headed := _is_header(first[0], first[1:], options):
        names = [name.strip() for name in first.pop(0)]
        if options.text_field and options.text_field not in names:
            raise Unreadable(_no_field(options.text_field, names))
    else:
        names = []
        options.notes.append(f"has no header: its columns are 1 to {len(first[0])} (see --text-field)")

    def whole_row(row: Fields, options: ReadOptions) -> str:
        return _text_or_all(row, options, named=headed)

    named = (_name_cells(names, row) for row in itertools.chain(first, cells))
    yield from _documents(path, enumerate(named, 1), whole_row, options)


def _name_cells(names: list[str], row: list[str]) -> dict[str, str]:
    """Return the cells of a row by the names of their columns; those after the last name by their numbers."""
    return dict(zip([*names, *map(str, range(len(names) + 1, len(row) + 1))], row, strict=False))


def _is_header(row: list[str], others: list[list[str]], options: ReadOptions) -> bool:
    """Whether the first row of a table names its columns.

    It does if it has one of the usual names. It does not if it contains a number, a date, an address or a sentence,
    except for years that count up; nor if one of its cells occurs again in its column, or --text-field is the number of
    a column.
    """
    names = {name.strip() for name in row}
    if options.text_field:
        if options.text_field in names:
            return True
        if options.text_field.isdecimal():
            return False
    if not names.isdisjoint(_TEXT):
        return True
    if any(cell and cell == other for each in others for cell, other in zip(row, each, strict=False)):
        return False
    years = [cell for cell in row if _YEAR.fullmatch(cell.strip())]
    if len(years) > 1 and years == sorted(set(years)):
        row = [cell for cell in row if cell not in years]
    return not any(_VALUE.fullmatch(cell.strip()) for cell in row)


def _documents(
    path: Path,
    rows: Iterator[tuple[int, Fields | None]],
    text_of: Callable[[Fields, ReadOptions], str],
    options: ReadOptions,
) -> Iterator[Document]:
    found, bad, first = 0, 0, 0
    fields: dict[str, Any] = {}
    for number, row in rows:
        text = text_of(row, options) if row is not None else ""
        if row is None or not text.strip():
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


def _text_field(row: Fields, options: ReadOptions) -> str:
    return _string(_first(row, options.text_field, _TEXT))


def _text_or_all(row: Fields, options: ReadOptions, *, named: bool) -> str:
    text = _text_field(row, options)
    if text or options.text_field or any(name in row for name in _TEXT):
        return text
    cells = [(name, value) for name, value in row.items() if name and value.strip()]
    return "\n".join(f"{name}: {value}" if named else value for name, value in cells)


def _first(row: Fields, given: str | None, usual: tuple[str, ...]) -> Any:
    """Return the value of the given field, or of the first one with a usual name and a value."""
    names = (given,) if given else usual
    return next((row[name] for name in names if row.get(name)), "")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    # JSON can contain lone surrogates, which UTF-8 cannot encode.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
