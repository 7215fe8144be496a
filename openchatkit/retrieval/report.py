"""What a person is shown of an index and of what it finds: tables, in colour on a terminal alone; and JSON."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openchatkit.formats.retrieval_index import Skipped
from openchatkit.retrieval.passage import Hit

_SNIPPET = 300  # characters
_COPIES = 3  # places named beside the first
_NARROWEST = 80  # columns, where the output is no terminal


def print_hits(hits: Sequence[Hit]) -> None:
    """Passages as a table: scores, where each stands, and how it begins."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "score", "cosine", "BM25"):
        table.add_column(name, justify="right", no_wrap=True, style="cyan")
    table.add_column("passage", ratio=1, overflow="fold")
    for number, hit in enumerate(hits, 1):
        where = Text(visible("; also ".join([hit.where, *hit.also[:_COPIES]])), style="green")
        where.append(f" and {len(hit.also) - _COPIES:,} more" if len(hit.also) > _COPIES else "")
        title = Text(hit.title, style="bold")
        text = " ".join(hit.text.split())
        snippet = Text(text if len(text) <= _SNIPPET else f"{text[:_SNIPPET].rsplit(' ', 1)[0]} ...")
        cell = Text("\n").join(part for part in (where, title, snippet) if part.plain)
        table.add_row(str(number), f"{hit.score:.4f}", _score(hit.dense, 3), _score(hit.sparse, 2), cell)
    console.print(table)


def print_info(about: Mapping[str, Any]) -> None:
    """Facts about an index, a line each; lists below one another."""
    console = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, value in about.items():
        table.add_row(Text(name), Text(_value(value)))
    console.print(table)


def print_json(value: Any) -> None:
    """Print JSON that all can read; bytes of a file's name that are no UTF-8 stand as halves of characters."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    print(text.encode("utf-8", "backslashreplace").decode())


def print_skipped(skipped: Sequence[Skipped], most: int) -> None:
    """Say on stderr what was left out, the first of it by name."""
    if skipped:
        print(f"{len(skipped):,} left out, in part or whole:", file=sys.stderr)
    for each in skipped[:most]:
        print(f"  {visible(each.source)}: {each.reason}", file=sys.stderr)
    if len(skipped) > most:
        print("  ... (all of them: info --skipped)", file=sys.stderr)


def visible(name: str) -> str:
    """The name of a file; what a terminal would obey, or cannot show, is written as its escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(each)}" for name, each in value.items() if each not in (None, [], ""))
    if isinstance(value, list):
        return "\n".join(visible(each) if isinstance(each, str) else _entry(each) for each in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else visible(str(value))


def _entry(entry: Mapping[str, Any]) -> str:
    """A source or what was left out: its name, then what is said of it."""
    rows = f"{entry['rows']:,} passages" if "rows" in entry else entry["reason"]
    return f"{visible(entry['source'])}: {rows}"


def _score(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(shutil.get_terminal_size((120, 24)).columns, _NARROWEST)
    return console
