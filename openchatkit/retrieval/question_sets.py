"""Two sets of real texts for evaluating retrieval, which any machine can make: no hub, nothing to install.

`awscli`: the examples in one pinned wheel of awscli; a question is the title of an example, its passage is the rest.
`stdlib`: the docstrings of the running Python, parsed, not imported; a question is the first paragraph of a docstring,
its passage the others. Of passages with the same title, the set has the first.
"""

import ast
import hashlib
import random
import re
import sysconfig
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.retrieval.building.plan import NewSource, make_row
from openchatkit.retrieval.evaluation import EvaluationQuestion, Target
from openchatkit.retrieval.table import PassageRow

AWSCLI = "1.46.2"
QUESTIONS, SEED = 500, 0
TOKENS = 128  # of a passage for the encoder: the length that MiniLM was trained on; with 256 it finds less
_HOW = f"pip download awscli=={AWSCLI} --no-deps"
_TITLE = re.compile(r"^\s*\*\*(?:Example \d+: *)?(.+?)\*\*\s*$", re.MULTILINE)
# Tests, bundled tools and third-party packages say little about the library.
_SKIPPED = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Example:
    """A passage, its source, and the title by which it should be found."""

    source: str
    title: str
    text: str


def awscli(wheel: Path) -> list[Example]:
    """Return the examples in a wheel of awscli, in the order of their names."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if re.fullmatch(r"awscli/examples/.+\.rst", name))
            found = [_example(name, archive.read(name).decode("utf-8", "replace")) for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} cannot be read: {error}; get it with: {_HOW}") from error
    if not found:
        raise UserError(f"{wheel} holds no examples: expected a wheel of awscli; get it with: {_HOW}")
    return _select_titled(found)


def stdlib(folder: Path | None = None) -> list[Example]:
    """Return the docstrings of several paragraphs in a folder of Python sources, by default the standard library."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found: list[Example] = []
    for path in sorted(folder.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(folder).parts):
            found += _docstrings(path, path.relative_to(folder).as_posix())
    if not found:
        raise UserError(f"{folder} holds no docstrings: expected a folder of Python sources")
    return _select_titled(found)


def source(name: str, examples: list[Example]) -> NewSource:
    """Return the passages of a set, uncut, as a source for `operations.build_rows`."""
    whole = hashlib.sha256()
    for each in examples:
        whole.update(repr((each.source, each.text)).encode())

    def rows(_: list[str]) -> Iterator[PassageRow]:
        for number, each in enumerate(examples):
            yield make_row(each.text, "", each.source, "", number, 0)

    return NewSource(name, whole.hexdigest(), [sum(len(each.text) for each in examples), 0, 0, 0], rows)


def questions(examples: list[Example], *, count: int = QUESTIONS, seed: int = SEED) -> list[EvaluationQuestion]:
    """Return `count` titles, drawn by a seed, as questions for their passages."""
    drawn = random.Random(seed).sample(examples, min(count, len(examples)))
    return [EvaluationQuestion(each.title, (Target(source=each.source),)) for each in drawn]


def _example(name: str, text: str) -> Example:
    text = text.replace("\r\n", "\n")
    title = _TITLE.search(text)
    if title is None:
        return Example(name, "", text)
    return Example(name, " ".join(title[1].split()), (text[: title.start()] + text[title.end() :]).strip())


def _docstrings(path: Path, name: str) -> Iterator[Example]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escape sequences in the sources
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            line = getattr(node, "lineno", 1)
            yield Example(f"{name}:{line}", " ".join(first.split()), rest.strip())


def _select_titled(examples: Iterable[Example]) -> list[Example]:
    """Return the examples that have a title and a text; of those with the same title, the first."""
    whole: dict[str, Example] = {}
    for each in examples:
        if each.title and each.text:
            whole.setdefault(each.title.casefold(), each)
    return list(whole.values())
