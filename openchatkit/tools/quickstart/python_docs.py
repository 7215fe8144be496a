"""First sentences of the docstrings of the running Python's standard library, one for each public name.

Owns which files are read, which names are public and what a clean first sentence is. Sources are parsed, never
imported, so nothing in them runs. `python_chats` makes chats of the entries.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openchatkit.errors import UserError

# Tests, bundled tools and other people's packages are no part of the documented library.
_SKIPPED = (
    *("__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib-dynload", "lib2to3"),
    *("pydoc_data", "site-packages", "test", "tests", "turtledemo"),
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z(`'\"]|\s*$)")
_MARKUP = (">>>", "::", " -- ", "->", "<human>", "<bot>")
_MIN_CHARS, _MAX_CHARS, _MIN_WORDS = 15, 110, 3
_MAX_NAME_CHARS = 48


@dataclass(frozen=True, order=True)
class DocEntry:
    """A qualified name, such as `json.dumps`, and the first sentence of its docstring."""

    name: str
    sentence: str

    @property
    def passage(self) -> str:
        return f"{self.name}: {self.sentence}"


def standard_library() -> Path:
    """Return the folder of the running Python's standard library, also from inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def read_library(folder: Path) -> list[DocEntry]:
    """Read every public module, function, class and method with a clean first sentence, sorted by name.

    Files that do not parse are skipped. UserError when nothing is found.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected a Python standard library; pass one with --library")
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        module = _module_name(path.relative_to(folder))
        if module is None:
            continue
        tree = _parse(path)
        if tree is None:
            continue
        for name, docstring in _iter_docstrings(tree, module):
            sentence = first_sentence(docstring)
            if sentence and len(name) <= _MAX_NAME_CHARS:
                found.setdefault(name, sentence)
    if not found:
        raise UserError(f"no docstrings in {folder}: expected Python sources; pass their folder with --library")
    return [DocEntry(name, sentence) for name, sentence in sorted(found.items())]


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring on one line; an empty string if it has none that is clean."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split()).replace("``", "`")
    end = _SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else ""
    if not _MIN_CHARS <= len(sentence) <= _MAX_CHARS or len(sentence.split()) < _MIN_WORDS:
        return ""
    clean = (
        sentence.isascii()
        and sentence.isprintable()
        and not any(mark in sentence for mark in _MARKUP)
        and not sentence.endswith(("..", "e.g.", "i.e."))
        and all(sentence.count(left) == sentence.count(right) for left, right in ("()", "[]", "{}"))
        and all(sentence.count(quote) % 2 == 0 for quote in '"`')
    )
    return sentence if clean else ""


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escape sequences in other people's sources
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return None


def _module_name(path: Path) -> str | None:
    """Return `json.encoder` for `json/encoder.py`, `json` for `json/__init__.py`; None for private and skipped ones."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    if not parts or any(part in _SKIPPED or not _is_public(part) for part in parts):
        return None
    return ".".join(parts)


def _iter_docstrings(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """Yield qualified names and docstrings of `node` and of the public functions and classes defined in it."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef) and _is_public(child.name):
            yield from _iter_docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and _is_public(child.name):
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"{name}.{child.name}", docstring


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")
