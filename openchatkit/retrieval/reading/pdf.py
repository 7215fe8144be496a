"""PDF files as blocks, page by page, by pypdf: nothing is drawn, run or fetched."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit.errors import UserError
from openchatkit.retrieval.reading import streams
from openchatkit.retrieval.reading.document import Block, Document, Options, Unreadable, one_line, paragraphs

if TYPE_CHECKING:
    from pypdf import PdfReader


def pdf(path: Path, options: Options) -> Iterator[Document]:
    """A PDF's text, titled by its own title or its file's name.

    Unreadable: encrypted with a password, broken, too large, or pictures of pages alone. UserError: pypdf is missing.
    """
    try:
        import pypdf
    except ImportError:
        raise UserError("reading PDF needs a package: pip install 'openchatkit[retrieval]', or pypdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every flaw that it gets over
    if path.stat().st_size > options.max_bytes:
        raise Unreadable(f"too large: more than {options.max_bytes:,} bytes (see --max-bytes)")
    with open(path, "rb") as file:
        try:
            reader = pypdf.PdfReader(file)
            locked = reader.is_encrypted and not reader.decrypt("")
            count = 0 if locked else len(reader.pages)
            title = "" if locked else one_line((reader.metadata and reader.metadata.title) or "")
        except Exception as error:  # pypdf lets through whatever a broken file leads to
            raise Unreadable(f"broken: {one_line(str(error)) or type(error).__name__}") from error
        if locked:
            raise Unreadable("encrypted: save it without a password")
        blocks = [block for page in range(min(count, options.max_pages)) for block in _page(reader, page, options)]
    if count > options.max_pages:
        options.notes.append(f"only {options.max_pages:,} of {count:,} pages (see --max-pages)")
    if not blocks:
        raise Unreadable("holds no text: pictures of pages, perhaps; recognise their text first")
    yield Document(iter(blocks), "page", title or streams.stem(path))


def _page(reader: "PdfReader", number: int, options: Options) -> Iterator[Block]:
    """The paragraphs of a page, counted from 0; none, and a note, where it is broken."""
    try:
        text = reader.pages[number].extract_text() or ""
    except Exception as error:  # as above; the other pages may be whole
        options.notes.append(f"page {number + 1} is broken: {one_line(str(error)) or type(error).__name__}")
        return
    yield from paragraphs(text, number + 1)
