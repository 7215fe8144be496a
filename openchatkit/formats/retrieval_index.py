"""The folder of a retrieval index: its files' names, and the manifest that alone says which of them belong to it.

An index is rewritten whole, as a snapshot: files are named `<role>-<snapshot>.<ending>` and never change once the
manifest names them. A manifest is put in place last, so that until then the snapshot before it is what the folder
holds, and whoever has that one open keeps it. Files that the manifest does not name are left-overs of a kill.

    table.arrow       the passages, a row each: see `retrieval.table`
    vectors.npy       float16 [rows, dimension], in the order of the table
    dense.faiss       the same vectors, for searching
    scores.npy        float32 [entries]: BM25 scores, of one word after another
    postings.npy      int32 [entries]: the rows they are of, ascending for each word
    starts.npy        int64 [words + 1]: where each word's entries begin
    words.arrow       the words, sorted, with the highest score and the weight of each
    sources.jsonl     what the passages were read from: a `SourceRecord` a line
    skipped.jsonl     what could not be read: {"source", "reason"} a line

The vectors' files and dense.faiss are missing where there is no encoder. scores, postings and starts are the arrays
that bm25s keeps. The manifest is that of `formats.manifest`; its facts are an `IndexRecord`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from openchatkit import jsonl, storage
from openchatkit.errors import UserError
from openchatkit.formats import manifest
from openchatkit.formats.manifest import DamagedError, FileRecord

_T = TypeVar("_T")

FORMAT = "openchatkit retrieval index"
VERSION = 3  # rises too when `retrieval.words` would no longer make the same of a text
MANIFEST = manifest.MANIFEST
ROLES = {
    "table": ".arrow",
    "vectors": ".npy",
    "dense": ".faiss",
    "scores": ".npy",
    "postings": ".npy",
    "starts": ".npy",
    "words": ".arrow",
    "sources": ".jsonl",
    "skipped": ".jsonl",
}
_KEYS = {"snapshot": "generation", "score_threshold": "floor"}  # of the manifest, where a field has another name
_SPILL = "spill"  # while a snapshot is written
_PARTIAL = ".openchatkit-partial"  # a name that no other program has
_OURS = re.compile(
    rf"({'|'.join([*ROLES, _SPILL])})-\d{{6,}}\.(arrow|npy|faiss|jsonl|bin)|\.{re.escape(MANIFEST)}\..*\.tmp"
)


@dataclass(frozen=True)
class EncoderRecord:
    """Whose vectors an index holds; `digest` is of its weights and tokenizer, `metric` is "cosine" or "dot"."""

    name: str
    digest: str
    dimension: int
    metric: str
    max_tokens: int
    pooling: str = ""


@dataclass(frozen=True)
class DenseRecord:
    """How vectors are searched: `type` is faiss's; `probes` of `lists` are looked at (0: all rows are), `candidates`
    for each wanted row are scored again by the kept vectors; `recall` is the recall@10 that was measured with that."""

    type: str
    lists: int = 0
    probes: int = 0
    candidates: int = 1
    recall: float = 1.0


@dataclass(frozen=True)
class SparseRecord:
    """BM25's settings and counts."""

    k1: float
    b: float
    words: int
    entries: int
    mean_words: float


@dataclass(frozen=True)
class ScoreThreshold:
    """What a passage must show to be found: see `retrieval.fusion`."""

    cosine: float
    weak_cosine: float
    strength: float
    strength_alone: float


@dataclass(frozen=True)
class SourceRecord:
    """A file or address, the SHA-256 of its bytes, its rows (so many from `first` on), and its `storage.stamp`.

    `changed_ns` is 0 where it could not be relied on, and in indices from before it was kept.
    """

    source: str
    digest: str
    size: int
    mtime_ns: int
    first: int
    rows: int
    changed_ns: int = 0
    inode: int = 0

    @property
    def stamp(self) -> storage.Stamp:
        return [self.size, self.mtime_ns, self.changed_ns, self.inode]


@dataclass(frozen=True)
class Skipped:
    """A source that gave no passage, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class IndexRecord:
    """What the manifest says of an index; `time_stamps` are of its files by name, in nanoseconds."""

    snapshot: int
    rows: int
    sources: int
    skipped: int
    encoder: EncoderRecord | None
    dense: DenseRecord | None
    sparse: SparseRecord
    score_threshold: ScoreThreshold
    chunking: dict[str, Any] = field(default_factory=dict)
    time_stamps: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the record under the keys that the manifest has."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}


def file_name(role: str, snapshot: int) -> str:
    """The name of a file of a snapshot."""
    return f"{role}-{snapshot:06d}{ROLES[role]}"


def temporary_path(folder: Path, snapshot: int) -> Path:
    """Where words are kept while a snapshot is written."""
    return folder / f"{_SPILL}-{snapshot:06d}.bin"


def partial_folder(folder: Path) -> Path:
    """Where whoever builds an index keeps what it has embedded until a snapshot holds it; never taken for litter."""
    return folder / _PARTIAL


def exists(folder: Path) -> bool:
    """Whether there is an index, whole or not."""
    return (folder / MANIFEST).is_file()


def stamp(folder: Path) -> object:
    """What differs once another manifest is in place, and costs next to nothing to ask; None where there is none."""
    try:
        return storage.stamp(folder / MANIFEST)
    except OSError:
        return None


def lock_path(folder: Path) -> Path:
    """What a writer locks: one file, whatever links and dots the folder is named by."""
    return storage.lock_path(Path(folder).resolve())


def check_own(folder: Path) -> None:
    """UserError where a new index would take the place of something else in a folder: another kind of folder, an index
    of another version, or files of other programs beside no index at all."""
    try:
        about = json.loads((folder / MANIFEST).read_bytes())["about"]
        kind, version = about.get("format"), about.get("version")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        kind = version = None
    if kind == FORMAT and version == VERSION:
        return
    if kind == FORMAT:
        raise UserError(
            f"{folder} is a retrieval index of version {version}, of another OpenChatKit: remove it first, so that it "
            f"is built again as version {VERSION}"
        )
    entries = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    ours = [name for name in entries if _OURS.fullmatch(name)]
    others = [name for name in entries if name not in ours and not (name == MANIFEST and ours)]
    if others:
        raise UserError(f"{folder} is no index and holds other files, such as {others[0]}: pass --index a new folder")


def write(folder: Path, record: IndexRecord, files: Iterable[FileRecord]) -> IndexRecord:
    """Put the manifest in place, with the files' present time stamps: from here on this is what the folder holds."""
    files = list(files)
    stamps = {file.name: (folder / file.name).stat().st_mtime_ns for file in files}
    record = dataclasses.replace(record, time_stamps=stamps)
    manifest.write(folder, files, about={"format": FORMAT, "version": VERSION, **record.facts()})
    return record


def read(folder: Path) -> tuple[IndexRecord, dict[str, FileRecord]]:
    """The record of an index, and its files by name; DamagedError where there is none, or none that can be read."""
    about, files = _facts(folder)
    if about.pop("format", None) != FORMAT:
        raise DamagedError(f"{folder / MANIFEST} is of another kind of folder: expected a retrieval index")
    if (version := about.pop("version", None)) != VERSION:
        raise DamagedError(
            f"{folder} is a retrieval index of version {version}: this program reads version {VERSION}; remove it and "
            "build it again"
        )
    try:
        record = _record(about)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"{folder / MANIFEST} is damaged: {error}") from error
    # The names follow from the snapshot, so that no manifest leads out of its folder.
    expected = {file_name(role, record.snapshot) for role in roles(record)}
    if set(files) != expected or set(record.time_stamps) != expected:
        names = ", ".join(sorted(expected ^ set(files) | expected ^ set(record.time_stamps)))
        raise DamagedError(f"{folder / MANIFEST} is damaged: it should name one file for each part, but for {names}")
    return record, files


def roles(record: IndexRecord) -> list[str]:
    """The roles that an index has files for."""
    return [role for role in ROLES if record.encoder is not None or role not in ("vectors", "dense")]


def check_files(folder: Path, record: IndexRecord, files: dict[str, FileRecord]) -> None:
    """DamagedError for the first file that is missing or has another size or time stamp than the manifest says."""
    try:
        manifest.check_sizes(folder, manifest.Manifest(files, {}))
    except DamagedError as error:
        raise DamagedError(f"{error}; build the index again, or copy it again from where it is whole") from error
    for name, stamp in record.time_stamps.items():
        if (folder / name).stat().st_mtime_ns != stamp:
            raise DamagedError(
                f"{folder / name} was written to or copied since the index was made, by its time stamp: "
                "`python retrieval/build_index.py info --verify` hashes all files and, if they are whole, takes the "
                "new time stamps"
            )


def write_lines(path: Path, records: Iterable[Any]) -> int:
    """Write dataclasses as JSON, one a line; how many."""
    lines = [json.dumps(asdict(record)) + "\n" for record in records]
    storage.write_text(path, "".join(lines))
    return len(lines)


def read_sources(folder: Path, record: IndexRecord) -> list[SourceRecord]:
    """What the passages were read from."""
    return _lines(folder / file_name("sources", record.snapshot), SourceRecord)


def read_skipped(folder: Path, record: IndexRecord) -> list[Skipped]:
    """What could not be read."""
    return _lines(folder / file_name("skipped", record.snapshot), Skipped)


def stale_files(folder: Path) -> list[Path]:
    """Files of this format that the manifest does not name: what a kill, or the snapshot before, left."""
    try:
        names = set(read(folder)[1])
    except DamagedError:
        if exists(folder):
            return []  # what a damaged manifest meant to name may still be wanted
        names = set()
    return [path for path in sorted(folder.glob("*")) if _OURS.fullmatch(path.name) and path.name not in names]


def _facts(folder: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    if not exists(folder):
        found = f"{folder} has no {MANIFEST}" if folder.is_dir() else f"{folder} is not a folder"
        raise DamagedError(f"{found}: expected a retrieval index, as retrieval/build_index.py makes")
    read = manifest.read(folder)
    return dict(read.about), read.files


def _record(about: dict[str, Any]) -> IndexRecord:
    values = {**about, **{name: about[key] for name, key in _KEYS.items()}}
    for key in _KEYS.values():
        del values[key]
    nested = {
        "encoder": EncoderRecord,
        "dense": DenseRecord,
        "sparse": SparseRecord,
        "score_threshold": ScoreThreshold,
    }
    parts = {name: kind(**values[name]) if values[name] is not None else None for name, kind in nested.items()}
    record = IndexRecord(**{**values, **parts})
    if record.sparse is None or record.score_threshold is None or (record.encoder is None) != (record.dense is None):
        raise ValueError("a part of the record is missing")
    return record


def _lines(path: Path, make: Callable[..., _T]) -> list[_T]:
    def refuse(number: int, error: Exception) -> NoReturn:
        raise DamagedError(f"{path}:{number} is damaged: {error}") from error

    try:
        return list(jsonl.read(path, lambda row: make(**row), refuse))
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be read: {error.strerror}; if the index was being written to, run again"
        ) from error
