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

# The names that a field is looked for by where none is given, the likeliest first.
_TEXT = ("text", "content", "body", "passage")
_TITLE = ("title", "name", "heading")
_SOURCE = ("url", "source", "link")
_MARKS = ",;\t"  # between the columns of a table; spreadsheets of half of Europe write the second
_PEEKED = 20  # rows that are compared with the first, which may be a header
_YEAR = re.compile(r"(1[5-9]|20)\d\d")
# No name of a column: a number, also of money, a date or a time, an address, a sentence.
_VALUE = re.compile(r"[-+$€£(]*\d[\d.,:/ T-]*[%€$£)Z]*|\w+://\S+|\S+@\S+\.\w+|(\S+\s+){3,}\S+[.!。]|.{200,}", re.DOTALL)
_FIELD_LIMIT = 1 << 24  # characters of a field of a table

Fields = Mapping[str, Any]


def jsonl(path: Path, options: ReadOptions) -> Iterator[Document]:
    """One document a row; a row that is no object with a text is left out, noted and counted."""
    lines = streams.lines(path, options.notes, whole_rows=True)
    rows = ((number, parse_object(line)) for number, line in lines if line.strip())
    yield from _documents(path, rows, _text_field, options)


def json_file(path: Path, options: ReadOptions) -> Iterator[Document]:
    """One document for each object of an array that has the field of a text; any other JSON as the text that it is."""
    data, notes = streams.whole(path, options.max_bytes), []
    try:
        found = json.loads(encodings.decode(data, encodings.encoding_of_mark(data) or "utf-8", notes))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and any(isinstance(row, dict) and _text_field(row, options).strip() for row in found):
        options.notes += notes
        rows = enumerate((row if isinstance(row, dict) else None for row in found), 1)
        yield from _documents(path, rows, _text_field, options)
    else:
        yield from prose.code(path, options)


def table(path: Path, options: ReadOptions) -> Iterator[Document]:
    """One document a row of a table in text. Columns are parted by the mark that the first row has most of."""
    csv.field_size_limit(_FIELD_LIMIT)
    lines = (f"{line}\n" for _, line in streams.lines(path, options.notes, whole_rows=True))
    head = next(lines, "")
    tabs = streams.plain_name(path).lower().endswith(".tsv")
    mark = "\t" if tabs else max(_MARKS, key=head.count)
    reader = csv.reader(itertools.chain([head], lines), delimiter=mark)
    try:
        yield from of_cells(path, filter(None, reader), options)
    except csv.Error as error:
        raise Unreadable(f"line {reader.line_num} is no row of a table: {error}") from error


def of_cells(path: Path, cells: Iterator[list[str]], options: ReadOptions) -> Iterator[Document]:
    """One document a row: the field that holds the text, or all fields, each with its column's name.

    Where the first row is no header but like the others, columns are named by their numbers, which texts do not repeat.
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

    named = (_named(names, row) for row in itertools.chain(first, cells))
    yield from _documents(path, enumerate(named, 1), whole_row, options)


def _named(names: list[str], row: list[str]) -> dict[str, str]:
    """The cells of a row by their columns' names; those behind the last name by their numbers."""
    return dict(zip([*names, *map(str, range(len(names) + 1, len(row) + 1))], row, strict=False))


def _is_header(row: list[str], others: list[list[str]], options: ReadOptions) -> bool:
    """Whether the first row of a table names its columns.

    It does not where it holds a number, a date, an address or a sentence, but for years that count up; nor where a cell
    of it stands again in its column, or --text-field is the number of a column. It does where it has a name that is
    looked for.
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


def _text_field(row: Fields, options: ReadOptions) -> str:
    return _string(_first(row, options.text_field, _TEXT))


def _text_or_all(row: Fields, options: ReadOptions, *, named: bool) -> str:
    text = _text_field(row, options)
    if text or options.text_field or any(name in row for name in _TEXT):
        return text
    cells = [(name, value) for name, value in row.items() if name and value.strip()]
    return "\n".join(f"{name}: {value}" if named else value for name, value in cells)


def _first(row: Fields, given: str | None, usual: tuple[str, ...]) -> Any:
    """The value of a field: of the one that was named, or of the first that has one of the usual names and a value."""
    names = (given,) if given else usual
    return next((row[name] for name in names if row.get(name)), "")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        return ""
    # JSON can spell halves of characters, which no file can hold.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
