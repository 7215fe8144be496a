"""The page of `tools/inspect_data.py`: `page.html`, filled in. It needs no scripts and no other file."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from openchatkit import storage
from openchatkit.tools.inspection.figures import MixtureFigures, Quarantine
from openchatkit.tools.inspection.sampled import Sample, visible
from openchatkit.tools.inspection.terminal import (
    mixture_note,
    mixture_title,
    number,
    percent,
    sample_title,
    spell_out_lines,
)


def render(mixture: MixtureFigures, quarantines: Sequence[Quarantine], samples: Sequence[Sample]) -> str:
    """Return the page as HTML. Everything that comes from data is escaped, and the browser may run nothing."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(visible=visible, lines=spell_out_lines)
    environment.globals.update(colour=_colour, number=number, percent=percent, sample_title=sample_title)
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        mixture=mixture,
        quarantines=quarantines,
        samples=samples,
        title=mixture_title(mixture),
        note=mixture_note(mixture),
    )


def write(path: Path, mixture: MixtureFigures, quarantines: Sequence[Quarantine], samples: Sequence[Sample]) -> None:
    """Write the page, whole or not at all."""
    storage.write_text(path, render(mixture, quarantines, samples))


def _colour(source: int) -> str:
    """Return a colour for a source, far from those of its neighbours, readable on light and dark."""
    return f"hsl({(205 + source * 137.5) % 360:.0f} 60% 52%)"
