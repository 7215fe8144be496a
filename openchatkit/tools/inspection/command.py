"""`tools/inspect_data.py`: show the data that training would use or a step has used, or prove which data a run used.

`sampled` reads samples, `figures` computes the numbers of the sources, `terminal` and `page` show both, `steps` finds
the samples of a step, and `verification` is the proof.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from openchatkit import cli
from openchatkit.data import options
from openchatkit.errors import UserError
from openchatkit.settings import SettingsParser, flag, setting

_DRAW = 256  # samples of each source from which its share of the loss is estimated
_ENDS = 150  # tokens at either end of a sample that is shortened
_ROWS = 5  # rows shown of those set aside
# What may be asked of a run, and what else may be given then: the rest is in its checkpoint.
_OF_RUN = {
    "verify": ("tokenizer_name", "data_cache"),
    "step": ("tokenizer_name", "data_cache", "full"),
    "jumps": (),
}


@dataclass(frozen=True, kw_only=True)
class _SourceSettings:
    title: ClassVar[str] = "sources, as in training"
    task_name: str | None = setting(None, help="the data, as training takes it: name[:weight],name[:weight]")
    tokenizer_name: Path | None = setting(None, check=Path, help="folder with the tokenizer")


@dataclass(frozen=True, kw_only=True)
class _ShowSettings:
    title: ClassVar[str] = "what to show"
    total_steps: int | None = setting(
        None, check=cli.positive_int, help="steps that the figures are for; one epoch unless given"
    )
    batch_size: int = setting(32, check=cli.positive_int, help="sequences a step, over all replicas")
    samples: int = setting(3, check=cli.natural, help="how many samples to show")
    first: int | None = setting(
        None, check=cli.natural, help="number of the first of them; drawn by `--seed` unless given"
    )
    full: bool = setting(False, help="show long samples whole")
    html: Path | None = setting(None, check=Path, help="write the same as a page, too")


@dataclass(frozen=True, kw_only=True)
class _RunSettings:
    title: ClassVar[str] = "what a run has used"
    verify: bool = setting(False, help="compare its ledger with the data: each sample once")
    step: int | None = setting(None, check=cli.positive_int, help="show the samples that this step was taken on")
    jumps: bool = setting(False, help="list the steps whose loss jumped")
    checkpoint_path: Path | None = setting(None, check=Path, help="the run's checkpoints, or one of them")


@dataclass(frozen=True, kw_only=True)
class InspectionSettings(_SourceSettings, options.DataSettings, _ShowSettings, _RunSettings):
    """All settings of what to show, or to prove; `given` are the names of the settings that the user gave."""

    given: Collection[str] = ()

    def __post_init__(self) -> None:
        asked = [name for name in _OF_RUN if getattr(self, name)]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(map(flag, asked))} exclude each other: give one of them")
        if asked:
            self._check_run(asked[0])
        else:
            self._check_sources()

    def _check_run(self, asked: str) -> None:
        if not self.checkpoint_path:
            raise UserError(f"{flag(asked)} needs --checkpoint-path, the folder that training wrote its checkpoints to")
        for name in sorted(set(self.given).difference({asked, "checkpoint_path"}, _OF_RUN[asked])):
            raise UserError(
                f"{flag(name)} does not go with {flag(asked)}, which takes it from the checkpoint: leave it out"
            )

    def _check_sources(self) -> None:
        if self.checkpoint_path:
            raise UserError("--checkpoint-path goes with --verify, --step or --jumps alone: give one of them, too")
        for name in ("task_name", "tokenizer_name"):
            if not getattr(self, name):
                raise UserError(f"{flag(name)} is missing: give the one that training is given")
        if self.html and self.html.is_dir():
            raise UserError(f"--html {self.html} is a folder: give the file to write, {self.html / 'page.html'} say")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Show samples and the mixture, those of a step, or verify a run's ledger."""
    settings = parse(argv)
    if settings.verify:
        _verify(settings)
    elif settings.step:
        _show_step(settings)
    elif settings.jumps:
        _list_jumps(settings)
    else:
        _inspect(settings)


def parse(argv: Sequence[str] | None = None) -> InspectionSettings:
    """Read the settings of the command line and of `--config`; UserError for what does not go together."""
    parser = SettingsParser(
        InspectionSettings,
        prog="tools/inspect_data.py",
        description="Show what training would be given: samples, with the tokens that are trained on, and the "
        "mixture's figures. With --verify, prove that a run trained on each sample exactly once; with --step, show the "
        "samples of one of its steps.",
    )
    values = parser.read(argv).values
    return InspectionSettings(**values, given=values.keys())


def _inspect(settings: InspectionSettings) -> None:
    # torch takes seconds to import; --help and mistakes in the flags need not wait for it.
    from openchatkit.data.dataset import build_dataset
    from openchatkit.data.tokenizer import Tokenizer
    from openchatkit.storage import storage_errors
    from openchatkit.tools.inspection import figures, page, sampled, terminal

    assert settings.task_name, "the settings were checked"
    data_options = options.from_settings(vars(settings))
    tokenizer = Tokenizer(data_options.tokenizer)
    dataset = build_dataset(settings.task_name, data_options)
    steps = settings.total_steps or math.ceil(dataset.epoch_samples / settings.batch_size)
    mixture = figures.mixture(dataset, data_options, steps=steps, batch_size=settings.batch_size, draw=_DRAW)
    quarantines = list(figures.quarantines(dataset, first=_ROWS))
    numbers: Sequence[int] = range(settings.first or 0, (settings.first or 0) + settings.samples)
    if settings.first is None:
        numbers = sampled.choose(dataset, mixture.samples, settings.samples, seed=settings.seed)
    out = terminal.console()
    terminal.show_mixture(out, mixture)
    terminal.show_quarantines(out, quarantines)
    ends = None if settings.full else _ENDS
    terminal.show_samples(out, [sampled.read_sample(dataset, n, tokenizer, ends=ends) for n in numbers])
    if settings.html:
        whole = [sampled.read_sample(dataset, n, tokenizer) for n in numbers]
        with storage_errors(settings.html):
            page.write(settings.html, mixture, quarantines, whole)
        terminal.note(out, f"\n{settings.html} shows the same as a page")


def _verify(settings: InspectionSettings) -> None:
    from openchatkit.tools.inspection import terminal, verification

    assert settings.checkpoint_path, "the settings were checked"
    proof = verification.verify(
        settings.checkpoint_path, tokenizer=settings.tokenizer_name, cache_dir=_find_cache(settings)
    )
    terminal.show_proof(terminal.console(), proof)


def _show_step(settings: InspectionSettings) -> None:
    from openchatkit.tools.inspection import sampled, steps, terminal

    assert settings.checkpoint_path, "the settings were checked"
    assert settings.step, "the settings were checked"
    found = steps.find_samples(
        settings.checkpoint_path,
        settings.step,
        tokenizer=settings.tokenizer_name,
        cache_dir=_find_cache(settings),
    )
    ends, out = None if settings.full else _ENDS, terminal.console()
    terminal.show_step(out, found.step, found.samples, found.row)
    rows = [sampled.read_sample(found.dataset, number, found.tokenizer, ends=ends) for number in found.samples]
    terminal.show_samples(out, rows)


def _list_jumps(settings: InspectionSettings) -> None:
    from openchatkit.tools.inspection import steps, terminal

    assert settings.checkpoint_path, "the settings were checked"
    terminal.show_jumps(terminal.console(), steps.list_jumps(settings.checkpoint_path))


def _find_cache(settings: InspectionSettings) -> Path | None:
    """Return the folder of tokens if one is given: else the checkpoint knows it."""
    return settings.data_cache if "data_cache" in settings.given else None
