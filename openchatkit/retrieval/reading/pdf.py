"""PDF files as blocks, page by page, by pypdf: nothing is drawn, run or fetched."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit.errors import UserError
from openchatkit.retrieval.reading import streams
from openchatkit.retrieval.reading.document import Document, ReadOptions, Unreadable, one_line, paragraphs, place

if TYPE_CHECKING:
    from pypdf import PdfReader


_HALVES = re.compile(r"(?<!\w)(\w*[^\W\d_])([-\u2010\u00ad])[ \t]*\n[ \t]*([^\W\d_]\w*)")
_HYPHENED = re.compile(r"\b\w+-\w+\b")


def pdf(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Read the text of a PDF, titled by its own title or its file name.

    Unreadable: encrypted with a password, broken, too large, or only pictures of pages. UserError: pypdf is missing.
    """
    try:
        import pypdf
    except ImportError:
        raise UserError("reading PDF needs a package: pip install 'openchatkit[retrieval]', or pypdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every flaw that it can handle
    if path.stat().st_size > options.max_bytes:
        raise Unreadable(f"too large: more than {options.max_bytes:,} bytes (see --max-bytes)")
    with open(path, "rb") as file:
        try:
            reader = pypdf.PdfReader(file)
            locked = reader.is_encrypted and not reader.decrypt("")
            count = 0 if locked else len(reader.pages)
            title = "" if locked else one_line((reader.metadata and reader.metadata.title) or "")
        except Exception as error:  # pypdf raises anything for a broken file
            raise Unreadable(f"broken: {one_line(str(error)) or type(error).__name__}") from error
        if locked:
            raise Unreadable("encrypted: save it without a password")
        texts = [_read_page(reader, page, options) for page in range(min(count, options.max_pages))]
        pictures = [page for page, text in enumerate(texts, 1) if text == "" and _holds_picture(reader, page - 1)]
    if count > options.max_pages:
        options.notes.append(f"only {options.max_pages:,} of {count:,} pages (see --max-pages)")
    join = _make_joiner(text for text in texts if text)
    blocks = [block for page, text in enumerate(texts, 1) if text for block in paragraphs(join(text), page)]
    if not blocks:
        raise Unreadable("holds no text: pictures of pages, perhaps; recognise their text first")
    if pictures:
        options.notes.append(f"{_format_pages(pictures)}: pictures without text; recognise their text first")
    yield Document(iter(blocks), "page", title or streams.stem(path))


def _read_page(reader: "PdfReader", number: int, options: ReadOptions) -> str | None:
    """Return the text of a page, counted from 0; None, and a note, if it is broken."""
    try:
        text = reader.pages[number].extract_text() or ""
        return text if text.strip() else ""
    except Exception as error:  # as above; other pages may be intact
        options.notes.append(f"page {number + 1} is broken: {one_line(str(error)) or type(error).__name__}")
        return None


def _holds_picture(reader: "PdfReader", number: int) -> bool:
    try:
        return len(reader.pages[number].images) > 0
    except Exception:  # a broken picture counts as one
        return True


def _format_pages(numbers: list[int]) -> str:
    """Format numbers of pages, consecutive ones as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(place("page", run[0], run[-1]) for run in runs)


def _make_joiner(texts: Iterable[str]) -> Callable[[str], str]:
    """Return a function that joins words hyphenated across two lines of these texts.

    A hyphen between two small letters is removed, unless the texts contain the hyphenated word within a line.
    """
    hyphened = {match[0] for text in texts for match in _HYPHENED.finditer(text)}

    def join(match: re.Match[str]) -> str:
        before, hyphen, after = match.groups()
        if not (before[-1].islower() and after[0].islower()):
            return match[0]
        whole = f"{before}-{after}"
        return whole if whole in hyphened and hyphen != "\u00ad" else before + after

    return lambda text: _HALVES.sub(join, text)
