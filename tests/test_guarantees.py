"""README.md's table of guarantees: each test and benchmark that it names is there, marked if it takes minutes."""

import ast
import re
from pathlib import Path

from openchatkit.paths import ROOT

NAMED = re.compile(r"`((?:tests|benchmarks)/\S+\.py)(?:::(test_\w+))?`( \*)?")


def read_rows() -> list[str]:
    """Return the cells of the table that say what shows a guarantee."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## What is guaranteed, and by which test\n")[1].split("\n## ")[0]
    return [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| ")][1:]


def find_tests(path: Path) -> dict[str, bool]:
    """Return the tests of a file by name, and whether each is marked long, by itself or with all of its file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = "pytestmark = pytest.mark.long" in map(ast.unparse, tree.body)
    return {
        node.name: whole or "pytest.mark.long" in map(ast.unparse, node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_guarantee_names_tests_or_benchmarks_that_are_there():
    rows = read_rows()
    assert len(rows) > 15
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        assert NAMED.sub("", row).strip(" |,") == "", f"not a test or benchmark: {row}"
        for file, name, star in named:
            assert (ROOT / file).is_file(), file
            if file.startswith("tests/"):
                is_long = find_tests(ROOT / file).get(name)
                assert is_long is not None, f"{file} has no {name}"
                assert is_long == bool(star), f"{name} is marked long, or is not: so should it be in README.md"
