"""The plan for the next snapshot of an index: the unchanged sources, those to read, and the excluded ones.

A file is unchanged if its stamp is (`storage.stamp`), or else its SHA-256; then its passages are taken from the index.
The settings for reading and cutting files are in the manifest and the same for all files.
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
class BuildSettings:
    """How files become passages: how texts are cut, how rows and files are read; stored in the manifest."""

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
        """ReadOptions for reading one file; what is excluded is noted in a list."""
        return ReadOptions(self.text_field, self.title_field, self.source_field, self.max_bytes, self.max_pages, notes)


@dataclass(frozen=True)
class NewSource:
    """A source to read.

    `rows` yields its passages, appends what it excludes to a list, and raises Unreadable, even half way.
    """

    source: str
    digest: str
    stamp: storage.Stamp
    rows: Callable[[list[str]], Iterator[PassageRow]]


@dataclass
class BuildPlan:
    """The next snapshot: `unchanged` sources of the current one, `new` ones, those `skipped`, and facts to store."""

    encoder: Encoder | None
    unchanged: list[SourceRecord]
    new: list[NewSource]
    skipped: list[Skipped]
    about: dict[str, Any]
    notes: list[Skipped] = field(default_factory=list)  # about new sources; appended while they are read

    @property
    def excluded(self) -> list[Skipped]:
        """Everything excluded, in part or whole, in a fixed order."""
        return sorted({*self.skipped, *self.notes}, key=lambda each: (each.source, each.reason))


def compare(
    files: Iterable[Path], before: Sequence[SourceRecord], settings: BuildSettings, count: Count
) -> tuple[list[SourceRecord], list[NewSource], list[Skipped]]:
    """Return (unchanged, new, skipped) of these files; `before` are the sources of the index to compare with."""
    known = {record.source: record for record in before}
    unchanged: list[SourceRecord] = []
    new: list[NewSource] = []
    skipped: list[Skipped] = []
    files = list(files)
    with progress.bar(len(files), "files looked at", unit="file") as bar:
        for path in files:
            try:
                found = _compare_file(path, known.get(str(path)), settings, count)
                unchanged.append(found) if isinstance(found, SourceRecord) else new.append(found)
            except Unreadable as error:
                skipped.append(Skipped(str(path), str(error)))
            bar.update()
    return unchanged, new, skipped


def read_all(plan: BuildPlan, found: list[SourceRecord]) -> Iterator[PassageRow]:
    """Yield the rows of all new sources; the record of each is appended to `found` when it is complete.

    Rows of a source that turned out to be unreadable lie between records. Documents are numbered consecutively.
    """
    number = document = 0
    with progress.bar(len(plan.new), "files read", unit="file") as bar:
        for source in plan.new:
            first, last = number, -1
            notes: list[str] = []
            try:
                for row in source.rows(notes):
                    document, last = document + (row.document != last), row.document
                    number += 1
                    yield PassageRow(row.text, row.title, row.source, row.place, row.digest, document, row.position)
                if number == first:
                    raise Unreadable("holds no text")
                found.append(_make_record(source.source, source.digest, source.stamp, first, number - first))
            except Unreadable as error:
                notes = [str(error)]
            plan.notes += (Skipped(source.source, note) for note in notes)
            bar.update()


def make_row(text: str, title: str, source: str, place: str, document: int, position: int) -> PassageRow:
    """Make a row of the table, with the digest of the text that is embedded."""
    digest = vector_cache.text_digest(chunks.text_to_embed(title, text))
    return PassageRow(text, title, source, place, digest, document, position)


def _compare_file(
    path: Path, before: SourceRecord | None, settings: BuildSettings, count: Count
) -> SourceRecord | NewSource:
    stamp = _stamp(path)
    if before is not None and before.changed_ns and stamp == before.stamp:
        return before
    digest = reader.digest(path)
    if before is not None and before.digest == digest:
        return _make_record(str(path), digest, stamp, before.first, before.rows)
    return NewSource(str(path), digest, stamp, functools.partial(_read_rows, path, stamp, settings, count))


def _make_record(source: str, digest: str, stamp: storage.Stamp, first: int, rows: int) -> SourceRecord:
    """Make the record of a source, without a time of change if a later change might keep the stamp."""
    size, modified, changed, inode = stamp
    return SourceRecord(source, digest, size, modified, first, rows, changed if storage.is_settled(stamp) else 0, inode)


def _read_rows(
    path: Path, stamp: storage.Stamp, settings: BuildSettings, count: Count, notes: list[str]
) -> Iterator[PassageRow]:
    """Yield the passages of a file. Unreadable: possibly only after the last of them."""
    options = settings.options(notes)
    for number, document in enumerate(reader.read(path, options)):
        source = document.source or str(path)
        for position, chunk in enumerate(chunks.chunk_document(document, settings.chunking, count)):
            yield make_row(chunk.text, chunk.title, source, chunk.place, number, position)
    if _stamp(path) != stamp:
        raise Unreadable("was changed while it was read: run again when it is complete")


def _stamp(path: Path) -> storage.Stamp:
    """Return `storage.stamp` of a file. Unreadable: it no longer exists."""
    try:
        return storage.stamp(path)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
