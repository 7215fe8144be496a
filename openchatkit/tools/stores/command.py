"""The command `tools/stores.py`: count, merge and check token stores, of this kit and of GPT-NeoX."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.formats import label_store, token_store
from openchatkit.formats.token_store import TokenStore
from openchatkit.tools.stores.examination import StoreCounts, count, find_damage
from openchatkit.tools.stores.merging import merge

_DAMAGED = 1  # the exit status of `check`


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand. Returns the exit status."""
    flags = _build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = flags.run
    return run(flags)


def _build_parser() -> cli.Parser:
    whole = cli.Parser(prog="tools/stores.py", description="Count, merge and check token stores.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("count", _count, "count documents and tokens, and those that a mask or labels train on"),
        ("merge", _merge, "make one store of several, in the order given"),
        ("check", _check, "read stores whole, and name what is damaged first; the exit status is 1 then"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        stores = "prefix of a store, or one of its files"
        command.add_argument("stores", nargs="+", type=Path, metavar="STORE", help=stores)
        if name == "merge":
            command.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX", help="the new store")
            command.add_argument("--overwrite", action="store_true", help="replace a store of this name")
        if name == "check":
            command.add_argument("--vocab-size", type=cli.positive_int, help="ids must be below it")
            command.add_argument("--labels", type=Path, metavar="STORE", help="labels that the one store must fit")
    return whole


def _find(name: Path) -> Path:
    prefix = token_store.find_prefix(name)
    if prefix is None:
        raise UserError(f"there is no token store {name}: expected {token_store.idx_path(name)} and its .bin")
    return prefix


def _find_all(flags: argparse.Namespace) -> list[Path]:
    """Return the prefixes of the stores that are named; one that several of its files name counts once."""
    return list(dict.fromkeys(map(_find, flags.stores)))


def _count(flags: argparse.Namespace) -> int:
    counts = {str(prefix): count(TokenStore(prefix)) for prefix in _find_all(flags)}
    if len(counts) > 1:
        found = list(counts.values())
        known = [each.trained for each in found if each.trained is not None]
        types = ", ".join(dict.fromkeys(each.dtype for each in found))
        documents, tokens = sum(each.documents for each in found), sum(each.tokens for each in found)
        counts["all"] = StoreCounts(documents, tokens, sum(known) if known else None, types)
    rows = [("store", "documents", "tokens", "trained", "type")]
    for name, each in counts.items():
        trained = "-" if each.trained is None else f"{each.trained:,}"
        rows.append((name, f"{each.documents:,}", f"{each.tokens:,}", trained, each.dtype))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        numbers = (text.rjust(width) for text, width in zip(row[1:4], widths[1:4], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *numbers, row[4]]))
    return 0


def _merge(flags: argparse.Namespace) -> int:
    prefixes = _find_all(flags)
    if len(prefixes) < 2:
        raise UserError(f"merge takes two stores or more: found {prefixes[0]} alone")
    merged = merge(list(map(TokenStore, prefixes)), flags.output_prefix, overwrite=flags.overwrite)
    print(f"{merged.prefix}: {merged.documents:,} documents, {len(merged.tokens):,} tokens of {len(prefixes)} stores")
    return 0


def _check(flags: argparse.Namespace) -> int:
    prefixes = _find_all(flags)
    labels = None if flags.labels is None else _find(flags.labels)
    if labels is not None and len(prefixes) > 1:
        raise UserError(f"--labels {labels} belong to one store: found {len(prefixes)} stores")
    status = 0
    for prefix in prefixes if labels is None else [*prefixes, labels]:
        store, damage = _open(prefix)
        if store is not None:
            damage = find_damage(store, vocab_size=flags.vocab_size)
        if store is not None and damage is None and prefix == labels:
            damage = _compare(prefixes[0], labels)
        if store is None or damage is not None:
            status = _DAMAGED
            print(f"{prefix}: DAMAGED: {damage}")
        else:
            print(f"{prefix}: whole, {store.documents:,} documents, {len(store.tokens):,} tokens")
    return status


def _open(prefix: Path) -> tuple[TokenStore | None, str | None]:
    try:
        return TokenStore(prefix), None
    except UserError as error:
        return None, cli.one_line(error)


def _compare(prefix: Path, labels: Path) -> str | None:
    """Return how labels are out of step with their texts, or None."""
    try:
        store = label_store.open_labelled(prefix, labels)
    except UserError as error:
        return cli.one_line(error)
    difference = label_store.find_difference(store, TokenStore(labels), lambda _: None)
    return difference and f"out of step with {prefix}: {difference}"
