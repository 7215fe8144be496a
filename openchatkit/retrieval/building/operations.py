"""Making an index from files and keeping it up to date with them: `build`, `add`, `update`, `delete`.

Each writes a new snapshot of the index, or changes nothing. Nothing is embedded twice: neither passages of the index
nor those that a stopped run has embedded. How files are read is in `reading`, where texts are cut in `chunks`, and how
an index is written in `snapshot`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.retrieval_index import IndexRecord, Skipped, SourceRecord
from openchatkit.retrieval import chunks
from openchatkit.retrieval.building import plan
from openchatkit.retrieval.building.assembly import carry_out
from openchatkit.retrieval.building.current_snapshot import CurrentSnapshot
from openchatkit.retrieval.building.plan import BuildPlan, BuildSettings, NewSource
from openchatkit.retrieval.building.ranks import Ranks
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.reading import discovery
from openchatkit.retrieval.tokenization import estimate_tokens

__all__ = ["DEFAULT_ENCODER", "NO_ENCODER", "BuildSettings", "Ranks", "add", "build", "build_rows", "delete", "update"]

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
NO_ENCODER = "none"  # instead of the name of an encoder: the index is searched by words alone
_SPECIAL = 2  # tokens that an encoder puts around a text
_ALONE = Ranks()


def build(
    paths: Sequence[Path],
    folder: Path,
    *,
    encoder: str | None = None,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    ranks: Ranks = _ALONE,
) -> IndexRecord | None:
    """Make the index `folder` of `paths` and nothing else; return its record (None except in process 0).

    `settings` overrides `BuildSettings`. An existing index keeps what has not changed; a damaged one is made
    again. UserError: the index was made with another `encoder` or other `settings` than are given, there is nothing to
    read, or `folder` is something else.
    """
    roots = _resolve(paths)

    def make_plan(present: CurrentSnapshot | None) -> BuildPlan:
        tools = _choose_tools(folder, encoder, device, settings or {})
        files, skipped = _find(roots, folder, tools.settings)
        return _plan_whole(folder, tools, present, files, skipped, roots, [])

    return carry_out(folder, make_plan, device=device, ranks=ranks, replace=True)


def add(paths: Sequence[Path], folder: Path, *, device: str = "auto", ranks: Ranks = _ALONE) -> IndexRecord | None:
    """Add `paths` to an index; files that it already has are read only if they have changed."""
    layout.read(folder)
    added = _resolve(paths)

    def make_plan(present: CurrentSnapshot | None) -> BuildPlan:
        tools = _choose_tools(folder, None, device, {})
        before = _read_contents(folder, present)
        files, skipped = _find(added, folder, tools.settings)
        names = {str(file) for file in files}
        here = [source for source in before.sources if source.source in names]
        others = [source for source in before.sources if source.source not in names]
        unchanged, new, unread = plan.compare(files, here, tools.settings, tools.count)
        noted = [each for each in before.skipped if each.source not in names and not _is_within(each.source, added)]
        roots = sorted({*before.roots, *added})
        excluded = [name for name in before.excluded if not _is_within(name, added)]
        about = _about(tools.settings, roots, excluded)
        old_notes = _select_notes(unchanged, before.skipped)
        return BuildPlan(tools.encoder, [*others, *unchanged], new, [*noted, *old_notes, *skipped, *unread], about)

    return carry_out(folder, make_plan, device=device, ranks=ranks)


def update(folder: Path, *, device: str = "auto", ranks: Ranks = _ALONE) -> IndexRecord | None:
    """Read changed files again under the paths of an index, and remove those that are gone.

    UserError: one of the paths does not exist; it may be on a disk that is not mounted.
    """
    layout.read(folder)

    def make_plan(present: CurrentSnapshot | None) -> BuildPlan:
        tools = _choose_tools(folder, None, device, {})
        before = _read_contents(folder, present)
        for root in before.roots:
            if not Path(root).exists():
                raise UserError(f"{root} is not there any more: bring it back, or delete it from the index")
        files, skipped = _find(before.roots, folder, tools.settings)
        files = [file for file in files if not _is_within(str(file), before.excluded)]
        return _plan_whole(folder, tools, present, files, skipped, before.roots, before.excluded)

    return carry_out(folder, make_plan, device=device, ranks=ranks)


def delete(paths: Sequence[str], folder: Path) -> IndexRecord | None:
    """Remove files, or everything under a folder, from an index; they may be gone from the disk.

    `update` does not bring them back, `add` does. UserError: the index has nothing under one of `paths`, or nothing
    else.
    """
    layout.read(folder)
    unwanted = _resolve(map(Path, paths))

    def make_plan(present: CurrentSnapshot | None) -> BuildPlan:
        tools = _choose_tools(folder, None, "cpu", {})
        before = _read_contents(folder, present)
        held = [*before.roots, *(each.source for each in before.sources), *(each.source for each in before.skipped)]
        for name in unwanted:
            if not any(_is_within(each, [name]) for each in held):
                some = ", ".join(source.source for source in before.sources[:3])
                raise UserError(
                    f"{name}: the index holds nothing from there; it holds {some}, ... (see info --sources)"
                )
        remaining = [source for source in before.sources if not _is_within(source.source, unwanted)]
        if not remaining:
            raise UserError(f"that is all that {folder} holds: remove the folder instead")
        roots = [root for root in before.roots if not _is_within(root, unwanted)]
        excluded = sorted({*before.excluded, *(name for name in unwanted if _is_within(name, roots))})
        noted = [each for each in before.skipped if not _is_within(each.source, unwanted)]
        return BuildPlan(tools.encoder, remaining, [], noted, _about(tools.settings, roots, excluded))

    return carry_out(folder, make_plan)


def build_rows(
    source: NewSource, folder: Path, *, encoder: str | None, device: str = "auto", max_tokens: int | None = None
) -> IndexRecord | None:
    """Make an index of passages that are already cut, from one source, unless it has that source by its digest.

    The encoder of a new index reads at most `max_tokens` of a passage. UserError: the index is of something else.
    """

    def make_plan(present: CurrentSnapshot | None) -> BuildPlan:
        tools = _choose_tools(folder, encoder, device, {}, max_tokens)
        before = _read_contents(folder, present).sources
        if others := [each.source for each in before if each.source != source.source]:
            raise UserError(f"{folder} is an index of other things, such as {others[0]}: pass another --index")
        same = [each.digest for each in before] == [source.digest]
        about = _about(tools.settings, [], [])
        return (
            BuildPlan(tools.encoder, before, [], [], about)
            if same
            else BuildPlan(tools.encoder, [], [source], [], about)
        )

    return carry_out(folder, make_plan, device=device)


@dataclass(frozen=True)
class _Tools:
    """The encoder and settings that an index is made with."""

    encoder: Encoder | None
    settings: BuildSettings

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text, estimated if there is no encoder."""
        if self.encoder is not None:
            return self.encoder.count(texts)
        return [estimate_tokens(text) for text in texts]


@dataclass(frozen=True)
class _Contents:
    """The contents of the index before it is changed."""

    sources: list[SourceRecord]
    skipped: list[Skipped]
    roots: list[str]
    excluded: list[str]


def _plan_whole(
    folder: Path,
    tools: _Tools,
    present: CurrentSnapshot | None,
    files: Sequence[Path],
    skipped: Sequence[Skipped],
    roots: Sequence[str],
    excluded: Sequence[str],
) -> BuildPlan:
    """Plan an index of exactly these files."""
    before = _read_contents(folder, present)
    unchanged, new, unread = plan.compare(files, before.sources, tools.settings, tools.count)
    about = _about(tools.settings, roots, excluded)
    return BuildPlan(
        tools.encoder, unchanged, new, [*skipped, *unread, *_select_notes(unchanged, before.skipped)], about
    )


def _find(roots: Sequence[str], folder: Path, settings: BuildSettings) -> tuple[list[Path], list[Skipped]]:
    paths = [Path(root) for root in roots]
    return discovery.find(paths, exclude=[folder], include_ignored=settings.include_ignored)


def _read_contents(folder: Path, present: CurrentSnapshot | None) -> _Contents:
    if present is None:
        return _Contents([], [], [], [])
    record = present.record
    sources, skipped = layout.read_sources(folder, record), layout.read_skipped(folder, record)
    return _Contents(sources, skipped, record.chunking.get("roots", []), record.chunking.get("left_out", []))


def _choose_tools(
    folder: Path, encoder: str | None, device: str, given: Mapping[str, Any], max_tokens: int | None = None
) -> _Tools:
    """Return the encoder and settings of an index; for an existing one, those it was made with.

    UserError: these differ from what is given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not layout.exists(folder):
        name = encoder or DEFAULT_ENCODER
        made = None if name == NO_ENCODER else Encoder(name, device, max_tokens)
        return _Tools(made, _new_settings(made, given))
    record = layout.read(folder)[0]
    settings = BuildSettings(
        **{name: record.chunking[name] for name in asdict(BuildSettings()) if name in record.chunking}
    )
    held = asdict(settings)
    differing = [f"{_flag(name)} {held[name]}, not {value}" for name, value in given.items() if held[name] != value]
    made_with = record.encoder.name if record.encoder is not None else NO_ENCODER
    if encoder is not None and not _is_same_encoder(encoder, record, device):
        differing.append(f"--encoder {made_with}, not {encoder}")
    if differing:
        raise UserError(
            f"{folder} was made with {'; '.join(differing)}: leave these out to keep it, or pass another --index"
        )
    if record.encoder is None:
        return _Tools(None, settings)
    return _Tools(Encoder(made_with, device, record.encoder.max_tokens), settings)


def _flag(setting: str) -> str:
    """Return the flag of a setting."""
    return "--chunk-tokens" if setting == "tokens" else f"--{setting.replace('_', '-')}"


def _new_settings(encoder: Encoder | None, given: Mapping[str, Any]) -> BuildSettings:
    """Return settings for a new index; by default, chunks fit the encoder."""
    limit = encoder.max_tokens - _SPECIAL if encoder is not None else None
    tokens = given.get("tokens") or min(chunks.DEFAULT_TOKENS, limit or chunks.DEFAULT_TOKENS)
    overlap = given.get("overlap")
    overlap = min(chunks.DEFAULT_OVERLAP, tokens // 4) if overlap is None else overlap
    settings = BuildSettings(**{**given, "tokens": tokens, "overlap": overlap})
    settings.chunking.check(limit or tokens)
    return settings


def _is_same_encoder(encoder: str, record: IndexRecord, device: str) -> bool:
    if record.encoder is None or encoder == NO_ENCODER:
        return record.encoder is None and encoder == NO_ENCODER
    return Encoder(encoder, device).digest == record.encoder.digest


def _about(settings: BuildSettings, roots: Sequence[str], excluded: Sequence[str]) -> dict[str, Any]:
    """Return the facts for the manifest: settings, paths, and what was deleted."""
    return {**asdict(settings), "roots": list(roots), "left_out": list(excluded)}


def _select_notes(unchanged: Iterable[SourceRecord], skipped: Iterable[Skipped]) -> list[Skipped]:
    """Return the notes about unchanged sources."""
    names = {source.source for source in unchanged}
    return [each for each in skipped if each.source in names]


def _resolve(paths: Iterable[Path]) -> list[str]:
    return list(dict.fromkeys(str(discovery.real_path(path)) for path in paths))


def _is_within(name: str, folders: Sequence[str]) -> bool:
    """Whether a path is one of these, or is under one."""
    return any(name == folder or name.startswith(f"{folder.rstrip('/')}/") for folder in folders)
