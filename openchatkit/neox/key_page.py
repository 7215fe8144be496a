"""The tables of `docs/neox.md`: `python -m openchatkit.neox.key_page` writes them from the table of keys."""

from collections.abc import Iterable, Mapping

from openchatkit.neox import keys
from openchatkit.neox.key_tables import Key
from openchatkit.paths import ROOT

PAGE = ROOT / "docs" / "neox.md"
_START, _END = "<!-- keys, written by python -m openchatkit.neox.key_page -->\n", "<!-- end of keys -->"


def make_page(text: str) -> str:
    """Return the page's text with the tables between its two marks brought up to date."""
    start, end = text.index(_START) + len(_START), text.index(_END)
    found: dict[str, Key] = dict(keys.KEYS)
    for block, inner in keys.BLOCKS.items():
        found |= {f"{block}.{name}": key for name, key in inner.items()}
    followed = [name for name, key in found.items() if key.outcome == "use" and key.only is None]
    parts = [
        f"### Followed\n\n{_list(followed)}.",
        f"### Followed for some values\n\n{_make_table(found, 'use', 'values', 'otherwise refused')}",
        f"### Followed differently\n\n{_make_table(found, 'differ', 'as there', 'else')}",
        f"### Refused\n\n{_make_table(found, 'refuse', 'unless', 'reason')}",
        f"### Without effect\n\n{_make_table(found, 'ignore', '', 'reason')}",
    ]
    return text[:start] + "\n" + "\n\n".join(parts) + "\n\n" + text[end:]


def _make_table(found: Mapping[str, Key], outcome: str, values: str, reason: str) -> str:
    """Return a table of the keys of an outcome: one row for those that share values and reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, key in found.items():
        if key.outcome == outcome and key.why:
            only = [value for value in key.only or () if value not in (None, False, 0, []) or values == "values"]
            rows.setdefault((_list(map(str, only)) if values else "", key.why), []).append(name)
    head = ["key", *([values] if values else []), reason]
    lines = [f"| {' | '.join(head)} |", f"|{'-|' * len(head)}"]
    for (only_text, why), names in rows.items():
        cells = [_list(names), *([only_text] if values else []), why]
        lines.append(" ".join(f"| {' | '.join(cells)} |".split()))
    return "\n".join(lines)


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
