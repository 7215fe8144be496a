"""Reports about an index and its hits: tables, in colour only on a terminal, and JSON."""

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
_NARROWEST = 80  # columns, if the output is not a terminal


def print_hits(hits: Sequence[Hit]) -> None:
    """Print passages as a table: scores, places, and beginnings."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "score", "cosine", "BM25"):
        table.add_column(name, justify="right", no_wrap=True, style="cyan")
    table.add_column("passage", ratio=1, overflow="fold")
    for number, hit in enumerate(hits, 1):
        where = Text(_escape_name("; also ".join([hit.where, *hit.also[:_COPIES]])), style="green")
        where.append(f" and {len(hit.also) - _COPIES:,} more" if len(hit.also) > _COPIES else "")
        title = Text(hit.title, style="bold")
        text = " ".join(hit.text.split())
        snippet = Text(text if len(text) <= _SNIPPET else f"{text[:_SNIPPET].rsplit(' ', 1)[0]} ...")
        cell = Text("\n").join(part for part in (where, title, snippet) if part.plain)
        table.add_row(str(number), f"{hit.score:.4f}", _format_score(hit.dense, 3), _format_score(hit.sparse, 2), cell)
    console.print(table)


def print_info(about: Mapping[str, Any]) -> None:
    """Print facts about an index, one a line; lists take several lines."""
    console = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for name, value in about.items():
        table.add_row(Text(name), Text(_format_value(value)))
    console.print(table)


def print_json(value: Any) -> None:
    """Print JSON in UTF-8; bytes of file names that are not UTF-8 are printed as escaped surrogates."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    print(text.encode("utf-8", "backslashreplace").decode())


def print_skipped(skipped: Sequence[Skipped], most: int) -> None:
    """List on stderr the excluded files, the first `most` by name."""
    if skipped:
        print(f"{len(skipped):,} left out, in part or whole:", file=sys.stderr)
    for each in skipped[:most]:
        print(f"  {_escape_name(each.source)}: {each.reason}", file=sys.stderr)
    if len(skipped) > most:
        print("  ... (all of them: info --skipped)", file=sys.stderr)


def _escape_name(name: str) -> str:
    """Return the name of a file with control and unprintable characters escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(each)}" for name, each in value.items() if each not in (None, [], ""))
    if isinstance(value, list):
        return "\n".join(_escape_name(each) if isinstance(each, str) else _format_entry(each) for each in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else _escape_name(str(value))


def _format_entry(entry: Mapping[str, Any]) -> str:
    """Format a source or an excluded file: its name, then its passages or the reason."""
    rows = f"{entry['rows']:,} passages" if "rows" in entry else entry["reason"]
    return f"{_escape_name(entry['source'])}: {rows}"


def _format_score(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(shutil.get_terminal_size((120, 24)).columns, _NARROWEST)
    return console
