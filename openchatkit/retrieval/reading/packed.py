"""Documents in zip archives: Word, PowerPoint and Excel by libraries for them, EPUB by the reader of HTML.

Nothing in them is run or fetched; macros and pictures are ignored.
"""

import contextlib
import dataclasses
import importlib
import itertools
import posixpath
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from openchatkit.retrieval.reading import streams, tabular, web
from openchatkit.retrieval.reading.document import Block, Document, ReadOptions, Unreadable, clean, one_line, pieces

_UNPACKED = 8  # times `max_bytes`: the limit of the unpacked size
_CONTAINER = "META-INF/container.xml"
_ROOT, _PACKAGE, _NAMES = (
    "{urn:oasis:names:tc:opendocument:xmlns:container}",
    "{http://www.idpf.org/2007/opf}",
    "{http://purl.org/dc/elements/1.1/}",
)


def docx(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read a Word document: headings by their styles, tables one row a line; places count paragraphs and tables."""
    library = _import("docx", "python-docx")
    with _check_archive(path, options):
        document = library.Document(str(path))
        blocks = [
            block
            for number, part in enumerate(document.iter_inner_content(), 1)
            for block in _read_word_part(part, number)
        ]
        title = one_line(document.core_properties.title or "")
    yield _make_document(path, blocks, "paragraph", title)


def pptx(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read the slides of a presentation, each under its title, with its notes."""
    library = _import("pptx", "python-pptx")
    with _check_archive(path, options):
        show = library.Presentation(str(path))
        blocks = [block for number, slide in enumerate(show.slides, 1) for block in _read_slide(slide, number)]
        title = one_line(show.core_properties.title or "")
    yield _make_document(path, blocks, "slide", title)


def xlsx(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield one document for each row of the sheets, whose first row names the columns, as in other tables."""
    library = _import("openpyxl", "openpyxl")
    stem, found = streams.stem(path), False
    with _check_archive(path, options):
        book = library.load_workbook(path, read_only=True, data_only=True)
        for sheet in book.worksheets:
            title = f"{stem} > {sheet.title}" if len(book.worksheets) > 1 else stem
            cells = ([_cell(value) for value in row] for row in sheet.iter_rows(values_only=True))
            try:
                for document in tabular.of_cells(path, filter(any, cells), options):
                    found = True
                    yield dataclasses.replace(document, title=title if document.title == stem else document.title)
            except Unreadable as error:
                options.notes.append(f"sheet {sheet.title}: {error}")
        book.close()
    if not found:
        raise Unreadable("; ".join(options.notes) or "holds no sheet")


def epub(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read the chapters of a book, in reading order."""
    with _check_archive(path, options), zipfile.ZipFile(path) as archive:
        entry = ElementTree.fromstring(archive.read(_CONTAINER)).find(f".//{_ROOT}rootfile")
        if entry is None:
            raise Unreadable("is not a book: it has no list of chapters")
        name = entry.get("full-path", "")
        package = ElementTree.fromstring(archive.read(name))
        files = {item.get("id"): item.get("href", "") for item in package.iter(f"{_PACKAGE}item")}
        order = [files.get(item.get("idref"), "") for item in package.iter(f"{_PACKAGE}itemref")]
        title = one_line(package.findtext(f".//{_NAMES}title") or "")
        blocks = []
        for number, href in enumerate(filter(None, order), 1):
            chapter = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(href)))
            for block in web.blocks(archive.read(chapter), options.notes):
                blocks.append(dataclasses.replace(block, first=number, last=number))
    yield _make_document(path, blocks, "chapter", title)


def _make_document(path: Path, blocks: list[Block], unit: str, title: str) -> Document:
    if not blocks:
        raise Unreadable("holds no text: pictures alone, perhaps")
    return Document(iter(blocks), unit, title or streams.stem(path))


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Unreadable(f"reading it needs a package: pip install {package}") from None


@contextlib.contextmanager
def _check_archive(path: Path, options: ReadOptions) -> Iterator[None]:
    """Raise Unreadable if a file is too large, packed or unpacked, or its library fails."""
    limit = options.max_bytes
    if path.stat().st_size > limit:
        raise Unreadable(f"too large: more than {limit:,} bytes (see --max-bytes)")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _UNPACKED * limit:
                raise Unreadable(f"too large: unpacks to more than {_UNPACKED * limit:,} bytes (see --max-bytes)")
        yield
    except (Unreadable, OSError):
        raise
    except Exception as error:  # the libraries raise anything for a broken file
        raise Unreadable(f"broken: {one_line(str(error)) or type(error).__name__}") from error


def _read_word_part(part: Any, number: int) -> Iterator[Block]:
    if hasattr(part, "rows"):
        yield from _table(part, number)
        return
    style = (part.style.name if part.style is not None else "") or ""
    level = 1 if style == "Title" else int(style[8:]) if style.startswith("Heading ") and style[8:].isdigit() else 0
    yield from _block(part.text, number, level)


def _read_slide(slide: Any, number: int) -> Iterator[Block]:
    title = slide.shapes.title
    if title is not None:
        yield from _block(title.text_frame.text, number, level=1)
    for shape in _shapes(slide.shapes):
        if title is not None and shape.shape_id == title.shape_id:
            continue
        if shape.has_text_frame:
            yield from _block(shape.text_frame.text, number)
        elif shape.has_table:
            yield from _table(shape.table, number)
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        yield from _block(slide.notes_slide.notes_text_frame.text, number)


def _shapes(shapes: Any) -> Iterator[Any]:
    for shape in shapes:
        yield from _shapes(shape.shapes) if hasattr(shape, "shapes") else [shape]


def _table(table: Any, number: int) -> Iterator[Block]:
    """Yield a table, one row a line under the first; a merged cell is there once."""
    cells = ([" ".join(cell.text.split()) for cell in row.cells] for row in table.rows)
    lines = [clean(" | ".join(text for text, _ in itertools.groupby(row))) for row in cells if any(row)]
    if lines:
        head = lines[0] if len(lines) > 1 else ""
        yield from pieces(Block("\n".join(lines), number, number, head=head))


def _block(text: str, number: int, level: int = 0) -> Iterator[Block]:
    text = clean(text.replace("\v", "\n")).strip("\n").rstrip()
    if text.strip():
        whole = Block(one_line(text) if level else text, number, number, level)
        yield from [whole] if level else pieces(whole)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
