"""Files as documents: the kinds of files, and how each is read.

`digest` checks a file, `read` yields its documents; `discovery.find` lists the files of a folder. Nothing here fetches,
runs or follows anything inside a file; formats that cannot be read line by line are read whole, up to a limit.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from openchatkit.retrieval.reading import packed, pdf, prose, streams, tabular, web
from openchatkit.retrieval.reading.document import Document, ReadOptions, Unreadable

_Reader = Callable[[Path, ReadOptions], Iterator[Document]]

_CODE = """
.bash .bat .c .cc .cfg .clj .cmake .conf .cpp .cs .css .cxx .dart .el .erl .ex .exs .fish .go .gradle .graphql .groovy
.h .hh .hpp .hs .ini .java .jl .js .jsx .kt .kts .lisp .lua .m .mjs .mk .ml .php .pl .pm .properties .proto .ps1 .py
.pyi .r .rb .rs .scala .scss .sh .sql .svelte .swift .tex .tf .toml .ts .tsx .vb .vue .xml .yaml .yml .zig .zsh
"""
KINDS: dict[str, _Reader] = {
    "": prose.text,  # a README without an ending
    **dict.fromkeys((".txt", ".text", ".log"), prose.text),
    **dict.fromkeys((".md", ".markdown"), prose.markdown),
    ".rst": prose.restructured,
    **dict.fromkeys((".html", ".htm", ".xhtml"), web.html),
    ".pdf": pdf.pdf,
    **dict.fromkeys((".jsonl", ".ndjson"), tabular.jsonl),
    ".json": tabular.json_file,
    **dict.fromkeys((".csv", ".tsv"), tabular.table),
    ".docx": packed.docx,
    ".pptx": packed.pptx,
    ".xlsx": packed.xlsx,
    ".epub": packed.epub,
    **dict.fromkeys(_CODE.split(), prose.code),
}
_BINARY = (".pdf", ".docx", ".pptx", ".xlsx", ".epub")
READABLE = [ending for ending, reader in KINDS.items() if ending and reader is not prose.code]


def kind(path: Path) -> str | None:
    """Return the ending that decides how a file is read, without that of gzip; None for other kinds of files."""
    name = streams.plain_name(path)
    ending = Path(name).suffix.lower()
    if ending not in KINDS or (ending in _BINARY and name != path.name):
        return None
    return ending


def digest(path: Path) -> str:
    """Return the SHA-256 of a file. Unreadable: it is of another kind, cannot be opened, or is not text."""
    ending = kind(path)
    if ending is None:
        raise Unreadable("of no kind that is read")
    # An HTML page may name its encoding: it is known only when the page is read.
    return streams.digest(path, text=ending not in _BINARY and KINDS[ending] is not web.html)


def read(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a file; each must be read before the next. Unreadable: also half way."""
    ending = kind(path)
    assert ending is not None, path
    try:
        yield from KINDS[ending](path, options)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
