"""A clock that is set forward or back disturbs nothing: what waits, times out or is measured reads a monotonic one."""

import ast
from pathlib import Path

from openchatkit.paths import ROOT

LIBRARY = ROOT / "openchatkit"
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now", "date.today"}
# The function, and what it does with the time of day: shows it to people or notes it, or is right whatever it says.
KNOWN = {
    "download/http.py:retry_after": "the server gives a time of day; a wait that is too long is refused",
    "formats/chat_file.py:write": "noted",
    "inference/conversation/conversation.py:begin": "said to the model",
    "inference/server/app.py:__init__": "noted",
    "inference/server/responses.py:__init__": "noted",
    "neox/evaluation.py:evaluate": "in a file's name",
    "storage.py:is_settled": "compares a file's own times: one that is not clearly in the past is read again",
    "training/ledger_writer.py:__init__": "noted",
}


def find_readings(path: Path) -> set[str]:
    """Return the functions of a file that read the time of day."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL:
            found.add(f"{path.relative_to(LIBRARY)}:{function}")
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def test_nothing_is_decided_by_the_time_of_day():
    found = set().union(*map(find_readings, LIBRARY.rglob("*.py")))
    assert found == set(KNOWN), "read time.monotonic(), or say above why the time of day is right there"
