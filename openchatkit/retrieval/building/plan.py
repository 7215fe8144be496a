"""What an index is to hold: which sources stay as they are, which are read anew, and what is left out.

A file is the same while its stamp is (`storage.stamp`), or else its SHA-256; then its passages are taken from the index
as they are. How files were read and cut stands in the manifest and is the same for all of them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openchatkit import progress, storage
from openchatkit.formats.retrieval_index import Skipped, SourceRecord
from openchatkit.retrieval import chunks
from openchatkit.retrieval.building import vector_cache
from openchatkit.retrieval.chunks import Chunking, Count
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.reading import reader
from openchatkit.retrieval.reading.document import ReadOptions, Unreadable
from openchatkit.retrieval.table import PassageRow


@dataclass(frozen=True)
class Settings:
    """How files become passages: how texts are cut, how rows and files are read; as it stands in the manifest."""

    tokens: int = chunks.DEFAULT_TOKENS
    overlap: int = chunks.DEFAULT_OVERLAP
    text_field: str | None = None
    title_field: str | None = None
    source_field: str | None = None
    max_bytes: int = ReadOptions.max_bytes
    max_pages: int = ReadOptions.max_pages
    include_ignored: bool = False

    @property
    def chunking(self) -> Chunking:
        return Chunking(self.tokens, self.overlap)

    def options(self, notes: list[str]) -> ReadOptions:
        """ReadOptions for reading one file; what is left out of it is noted in a list."""
        return ReadOptions(self.text_field, self.title_field, self.source_field, self.max_bytes, self.max_pages, notes)


@dataclass(frozen=True)
class NewSource:
    """A source whose passages are made anew.

    `rows` gives them, notes in a list what it has left out, and raises Unreadable, half way too.
    """

    source: str
    digest: str
    stamp: storage.Stamp
    rows: Callable[[list[str]], Iterator[PassageRow]]


@dataclass
class BuildPlan:
    """The next snapshot: sources `kept` from the present one, `fresh` ones, what was `skipped`, and facts to note."""

    encoder: Encoder | None
    kept: list[SourceRecord]
    fresh: list[NewSource]
    skipped: list[Skipped]
    about: dict[str, Any]
    notes: list[Skipped] = field(default_factory=list)  # of what is fresh; added to while sources are read

    @property
    def left_out(self) -> list[Skipped]:
        """All that is left out, in part or whole, in a fixed order."""
        return sorted({*self.skipped, *self.notes}, key=lambda each: (each.source, each.reason))


def compare(
    files: Iterable[Path], before: Sequence[SourceRecord], settings: Settings, count: Count
) -> tuple[list[SourceRecord], list[NewSource], list[Skipped]]:
    """(unchanged, fresh, skipped) of these files; `before` are the sources of the index that the files may be."""
    known = {record.source: record for record in before}
    kept: list[SourceRecord] = []
    fresh: list[NewSource] = []
    skipped: list[Skipped] = []
    files = list(files)
    with progress.bar(len(files), "files looked at", unit="file") as bar:
        for path in files:
            try:
                found = _compare_file(path, known.get(str(path)), settings, count)
                kept.append(found) if isinstance(found, SourceRecord) else fresh.append(found)
            except Unreadable as error:
                skipped.append(Skipped(str(path), str(error)))
            bar.update()
    return kept, fresh, skipped


def read_all(plan: BuildPlan, found: list[SourceRecord]) -> Iterator[PassageRow]:
    """The rows of all fresh sources, one after the other; a record of each is appended to `found` when it is whole.

    Rows of a source that turned out to be unreadable are those between records. Documents are numbered through.
    """
    number = document = 0
    with progress.bar(len(plan.fresh), "files read", unit="file") as bar:
        for fresh in plan.fresh:
            first, last, notes = number, -1, []
            try:
                for row in fresh.rows(notes):
                    document, last = document + (row.document != last), row.document
                    number += 1
                    yield PassageRow(row.text, row.title, row.source, row.place, row.digest, document, row.position)
                if number == first:
                    raise Unreadable("holds no text")
                found.append(_make_record(fresh.source, fresh.digest, fresh.stamp, first, number - first))
            except Unreadable as error:
                notes = [str(error)]
            plan.notes += (Skipped(fresh.source, note) for note in notes)
            bar.update()


def make_row(text: str, title: str, source: str, place: str, document: int, position: int) -> PassageRow:
    """A row of the table, with the digest of what is embedded of it."""
    digest = vector_cache.text_digest(chunks.text_to_embed(title, text))
    return PassageRow(text, title, source, place, digest, document, position)


def _compare_file(
    path: Path, before: SourceRecord | None, settings: Settings, count: Count
) -> SourceRecord | NewSource:
    stamp = _stamp(path)
    if before is not None and before.changed_ns and stamp == before.stamp:
        return before
    digest = reader.digest(path)
    if before is not None and before.digest == digest:
        return _make_record(str(path), digest, stamp, before.first, before.rows)
    return NewSource(str(path), digest, stamp, functools.partial(_read_rows, path, stamp, settings, count))


def _make_record(source: str, digest: str, stamp: storage.Stamp, first: int, rows: int) -> SourceRecord:
    """The record of a source, without a time of change where a later change might keep the stamp."""
    size, modified, changed, inode = stamp
    return SourceRecord(source, digest, size, modified, first, rows, changed if storage.is_settled(stamp) else 0, inode)


def _read_rows(
    path: Path, stamp: storage.Stamp, settings: Settings, count: Count, notes: list[str]
) -> Iterator[PassageRow]:
    """The passages of a file. Unreadable, perhaps behind the last of them."""
    options = settings.options(notes)
    for number, document in enumerate(reader.read(path, options)):
        source = document.source or str(path)
        for position, chunk in enumerate(chunks.chunk_document(document, settings.chunking, count)):
            yield make_row(chunk.text, chunk.title, source, chunk.place, number, position)
    if _stamp(path) != stamp:
        raise Unreadable("was changed while it was read: run again when it is complete")


def _stamp(path: Path) -> storage.Stamp:
    """`storage.stamp` of a file. Unreadable: it is not there any more."""
    try:
        return storage.stamp(path)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
