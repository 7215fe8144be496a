"""Shows what `tools/inspect_data.py` finds on a terminal, or as plain text in a pipe.

Colour is for terminals only, and never the only sign: every line of a sample begins with a mark.
"""

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openchatkit.tools.inspection.figures import MixtureFigures, Quarantine
from openchatkit.tools.inspection.sampled import Sample, Span, visible
from openchatkit.tools.inspection.verification import Proof

_PIPE_WIDTH = 160
_BAR = 20
_EIGHTHS = " ▏▎▍▌▋▊▉"

_READ, _TRAINED, _SPECIAL, _NOTE = "dim", "bold green", "magenta", "cyan"


class _Console(Console):
    """rich's console; when the reader of a pipe has gone, the command handles it."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Return the console: it takes nothing for markup, and spells out what stdout cannot write."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return _Console(width=wide, markup=False, highlight=False, emoji=False)


def show_mixture(out: Console, mixture: MixtureFigures) -> None:
    """Print two tables: the sources, and their shares in training."""
    _show_sources(out, mixture)
    table = _table(f"\nMixture: {mixture_title(mixture)}")
    bars = out.width >= 110
    for name in ("weight", "sequences", "samples", "epochs", "of loss", "waste"):
        table.add_column(name, justify="right")
    if bars:
        table.add_column("")
    for source in mixture.sources:
        cells = [
            f"{source.weight:g}",
            percent(source.sequences),
            f"{source.samples:,}",
            number(source.epochs),
            percent(source.loss),
            percent(source.waste),
        ]
        table.add_row(_name(out, source.name), *cells, *([_bar(source.loss)] if bars else []))
    table.add_section()
    table.add_row("all", "", "100%", f"{mixture.samples:,}", "", "100%", percent(mixture.waste))
    out.print(table)
    out.print(Text(mixture_note(mixture), _READ))


def show_quarantines(out: Console, quarantines: Sequence[Quarantine]) -> None:
    """Print where the rows that were set aside are listed, and the first of them."""
    for quarantine in quarantines:
        rows = "1 row" if quarantine.rows == 1 else f"{quarantine.rows:,} rows"
        out.print()
        out.print(Text(visible(f"{quarantine.source}: {rows} set aside, listed in {quarantine.path}"), _NOTE))
        for row in quarantine.first:
            out.print(Text(f"  {visible(row)}"), soft_wrap=True)
        if quarantine.rows > len(quarantine.first):
            out.print(f"  and {quarantine.rows - len(quarantine.first):,} more")


def show_samples(out: Console, samples: Sequence[Sample]) -> None:
    """Print the legend, and each sample line by line."""
    out.print()
    out.print(
        Text.assemble(
            ("Samples: ", "bold"),
            ("+ trained on", _TRAINED),
            (" | ", ""),
            (". only read", _READ),
            (" | ", ""),
            ("# special token", _SPECIAL),
            (" | ↵ newline", ""),
        )
    )
    for sample in samples:
        out.print()
        out.print(Text(visible(sample_title(sample)), _NOTE), soft_wrap=True)
        for span in sample.spans:
            _show_span(out, span)
        if sample.padding:
            out.print(Text(f"   ... {sample.padding:,} tokens of padding", _NOTE))


def show_proof(out: Console, proof: Proof) -> None:
    """Print the runs in a ledger, and what it proves."""
    table = _table(None, "started")
    for name in ("layout", "steps", "samples"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for run in proof.runs:
        steps = f"{run.first_step:,} to {run.last_step:,}"
        table.add_row(visible(run.started), visible(run.layout), steps, f"{run.samples:,}")
    out.print(table)
    if proof.changed:
        note(out, "the data have changed since, though in nothing that was trained on up to there")
    if proof.later:
        note(out, f"rows of later steps, for which {proof.checkpoint.name} does not vouch: {proof.later:,}")
    runs = "1 run" if len(proof.runs) == 1 else f"{len(proof.runs)} runs"
    proved = f"verified: {proof.steps:,} steps, {proof.samples:,} samples, each trained exactly once, by {runs}"
    if proof.unused:
        proved += f"; {proof.unused:,} of them to no effect, since the gradient of their steps was not finite"
    out.print(proved, soft_wrap=True)


def show_step(out: Console, step: int, samples: range, row: Mapping[str, Any]) -> None:
    """Print which samples a step was taken on, and its loss by its `row` in metrics.jsonl."""
    note(out, f"step {step:,}: samples {samples[0]:,} to {samples[-1]:,}, as its ledger says{_describe_loss(row)}")
    for name, of in row.get("sources", {}).items():
        if of["loss"] is not None and len(row["sources"]) > 1:
            note(out, f"   {name}: loss {of['loss']:.3f} over {of['trained_tokens']:,} tokens")


def show_jumps(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the steps whose loss jumped, by their rows in metrics.jsonl."""
    for row in rows:
        first, last = row["jump"]["first_sample"], row["jump"]["last_sample"]
        out.print(f"step {row['step']:,}: samples {first:,} to {last:,}{_describe_loss(row)}", soft_wrap=True)
    if not rows:
        out.print("no loss has jumped")


def _describe_loss(row: Mapping[str, Any]) -> str:
    if "loss" not in row:
        return ""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    return f"; loss {loss}" + (f", usually {row['jump']['usual_loss']:.3f}" if "jump" in row else "")


def note(out: Console, text: str) -> None:
    """Print a remark."""
    out.print(Text(visible(text), _NOTE), soft_wrap=True)


def mixture_title(mixture: MixtureFigures) -> str:
    """Return how many steps and sequences the mixture's figures are for."""
    steps = "1 step" if mixture.steps == 1 else f"{mixture.steps:,} steps"
    return f"{steps} of {mixture.batch_size:,} sequences of {mixture.seq_length:,} tokens"


def mixture_note(mixture: MixtureFigures) -> str:
    """Return how many places in a sequence are trained on, and whether the shares are exact."""
    drawn = "exact" if not mixture.drawn else f"estimated from {mixture.drawn} samples of each source"
    return f"{percent(mixture.trained)} of all places in a sequence are trained on; shares of the loss are {drawn}"


def sample_title(sample: Sample) -> str:
    """Return the number and the source of a sample, and how much of it is trained on."""
    own = "" if sample.local == sample.number else f", number {sample.local:,}"
    trained = f"{sample.trained:,} of {sample.length:,} tokens trained on"
    return f"sample {sample.number:,}{own} of {sample.source}: {trained}"


def spell_out_lines(text: str) -> str:
    """Return a text with everything invisible spelled out, newlines too."""
    return visible(text).replace("\n", "↵\n")


def percent(share: float) -> str:
    """Return a share of 1 as a percentage; only 0 shows as 0."""
    return f"{share:.1%}" if share == 0 or share >= 0.0005 else "<0.1%"


def number(value: float) -> str:
    """Return a number of epochs: two decimals, or two digits of a small one."""
    return f"{value:,.2f}" if value == 0 or value >= 0.1 else f"{value:.2g}"


def _show_sources(out: Console, mixture: MixtureFigures) -> None:
    table = _table("\nSources")
    for name in ("rows", "set aside", "documents", "tokens", "trained"):
        table.add_column(name, justify="right")
    sources = mixture.sources
    for source in sources:
        table.add_row(
            _name(out, source.name),
            f"{source.rows:,}",
            f"{source.quarantined:,}",
            f"{source.documents:,}",
            f"{source.tokens:,}",
            percent(source.trained_tokens / source.tokens),
        )
    table.add_section()
    names = ("rows", "quarantined", "documents", "tokens", "trained_tokens")
    *counts, trained = (sum(getattr(source, name) for source in sources) for name in names)
    table.add_row("all", *(f"{count:,}" for count in counts), percent(trained / counts[-1]))
    out.print(table)


def _table(title: str | None, first: str = "source") -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, overflow="fold", min_width=12)
    return table


def _name(out: Console, name: str) -> str:
    """Return a source's name; where there is no room for it, its end."""
    name, room = visible(name), max(12, out.width - 60)
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _bar(share: float) -> Text:
    eighths = round(share * _BAR * 8)
    return Text(("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).strip(), "green")


def _show_span(out: Console, span: Span) -> None:
    if span.border:
        out.print(Text("   --- a document that does not see those above ---", _NOTE))
    if span.text is None:
        out.print(Text(f"   ... {span.tokens:,} tokens left out (--full shows them)", _NOTE))
        return
    mark = ("+" if span.trained else ".") + ("# " if span.special else "  ")
    style = _SPECIAL if span.special else _TRAINED if span.trained else _READ
    for line in _lines(out, span.text):
        out.print(Text.assemble((mark, _TRAINED if span.trained else _READ), (line, style)), soft_wrap=True)


def _lines(out: Console, text: str) -> Iterator[str]:
    """Yield the text's own lines, each with its newline shown, folded to the width of a terminal."""
    for line in spell_out_lines(text).splitlines():
        folded = Text(line).wrap(out, max(out.width - 3, 20), overflow="fold") if out.is_terminal else [Text(line)]
        yield from (part.plain for part in folded)
